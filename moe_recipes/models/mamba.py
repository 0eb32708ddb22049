"""Nemotron-H's Mamba mixer through the kernels of mamba-ssm and causal-conv1d on a GPU, and a lean scan elsewhere.

Without the kernels Transformers 5.24 computes all chunks at once, 2.5 GiB for one layer of Nano's heads at 4096 tokens,
rounds ``dt_bias`` to the model's dtype, and refuses packed rows. With them it passes by adapters on ``out_proj``.
``seq_idx``, which keeps the documents of a packed row apart, comes from ``models/documents.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.nemotron_h import modeling_nemotron_h as hf
from transformers.utils.deprecation import deprecate_kwarg

from moe_recipes.kernels.causal_conv import causal_conv_silu
from moe_recipes.kernels.chunk_scan import ScanShape, chunk_scan
from moe_recipes.kernels.documents import document_runs
from moe_recipes.kernels.gated_norm import gated_group_norm
from moe_recipes.models.blocks import modules_of_class, put_class
from moe_recipes.models.float32_kept import NAMES, is_kept, local_in_place, local_parameters
from moe_recipes.runtime.optimizations import Optimization

NAME = "Mamba kernels"


@functools.cache
def fused_kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's convolution, scan and gated norm as one call; None where it or causal-conv1d is not installed."""
    try:
        import causal_conv1d  # noqa: F401  without it the call below fails in the middle
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    except ImportError:
        return None
    return mamba_split_conv1d_scan_combined  # type: ignore[no-any-return]


def _is_plain(linear: nn.Module) -> bool:
    """True if the module's call is ``F.linear`` and nothing more: no adapter, no hook."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    return type(linear) is nn.Linear and "forward" not in linear.__dict__ and not hooks


class NemotronHMamba2Mixer(hf.NemotronHMamba2Mixer):
    """Parameters, name and results of Transformers' class; only its forward is another."""

    KEEPS_DOCUMENTS_APART = True

    @deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Transformers' own, which computes with a cache and while ``torch.compile`` traces.

        Args:
            attention_mask: ``[B, S]``, 0 where a token is padding.
            seq_idx: int ``[B, S]``, which document of its row a token belongs to; None where a row is one document.
        """
        if cache is not None or torch.compiler.is_compiling():
            documents = {} if seq_idx is None else {"seq_idx": seq_idx}
            with local_in_place(self, *NAMES):
                return super().forward(hidden_states, cache, attention_mask, **documents, **kwargs)
        projected = self.in_proj(hf.apply_mask_to_padding_states(hidden_states, attention_mask))
        A_log, D, dt_bias = local_parameters(self, *NAMES)
        A = -torch.exp(A_log.float())
        kernel = fused_kernel() if projected.is_cuda else None
        if kernel is not None:
            return self._through_kernel(kernel, projected, A, D, dt_bias, seq_idx)
        gate, x_and_BC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        shape = hidden_states.shape[:2]
        runs = document_runs(seq_idx, (shape[0], shape[1]))
        x_and_BC = causal_conv_silu(x_and_BC, self.conv1d.weight.squeeze(1), self.conv1d.bias, runs)
        x_and_BC = hf.apply_mask_to_padding_states(x_and_BC, attention_mask)
        states = self.n_groups * self.ssm_state_size
        x, B, C = x_and_BC.split([self.intermediate_size, states, states], dim=-1)
        limit = (float(self.time_step_limit[0]), float(self.time_step_limit[1]))
        y = chunk_scan(
            x.view(*shape, self.num_heads, self.head_dim), dt, A,
            B.view(*shape, self.n_groups, -1), C.view(*shape, self.n_groups, -1), D_H=D, dt_bias_H=dt_bias,
            shape=ScanShape(chunk_size=self.chunk_size, dt_limit=limit, runs=runs),
        )  # fmt: skip
        y = gated_group_norm(
            y.flatten(2), gate, self.norm.weight, group_size=self.norm.group_size, eps=self.norm.variance_epsilon
        )
        return self.out_proj(y.to(hidden_states.dtype))

    def _through_kernel(
        self, kernel: Callable[..., Tensor], projected: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor,
        seq_idx: Tensor | None,
    ) -> Tensor:  # fmt: skip
        fuse = _is_plain(self.out_proj)  # the kernel would pass by an adapter or a hook
        out = kernel(
            projected, self.conv1d.weight.squeeze(1), self.conv1d.bias, dt_bias.float(), A, D.float(),
            chunk_size=self.chunk_size, seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
            dt_limit=tuple(self.time_step_limit), activation=self.activation, rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.variance_epsilon, outproj_weight=self.out_proj.weight if fuse else None,
            outproj_bias=self.out_proj.bias if fuse else None, headdim=self.head_dim, ngroups=self.n_groups,
            norm_before_gate=False,
        )  # fmt: skip
        return out if fuse else self.out_proj(out)


def lean_mamba(model: nn.Module) -> Optimization | None:
    """Give every Mamba mixer of Nemotron-H the forward above; None where the model has none."""
    found = modules_of_class(model, hf.NemotronHMamba2Mixer)
    if not found:
        return None
    if not all(map(is_kept, found)):
        return Optimization(NAME, False, "Transformers' Mamba mixer is not the one that they replace")
    for mixer in found:
        put_class(mixer, NemotronHMamba2Mixer)
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if on_gpu and fused_kernel() is not None:
        return Optimization(NAME, True, f"{len(found)} layers, mamba-ssm and causal-conv1d")
    why = "mamba-ssm or causal-conv1d is not installed" if on_gpu else "the model is not on a GPU"
    return Optimization(NAME, False, f"{len(found)} layers in a lean scan: {why}")
