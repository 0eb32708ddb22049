"""Qwen3-MoE's decoder layer with the residual sum after attention and the norm after it in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf
from transformers.utils.deprecation import deprecate_kwarg

from moe_recipes.kernels.add_rms_norm import add_rms_norm
from moe_recipes.models.blocks import fingerprint, fuse_class
from moe_recipes.models.fused.norms import runs_alone
from moe_recipes.runtime.optimizations import Optimization

NAME = "fused residual sum and norm"
REPLACED = "902f3b2f1293d535"
"""Fingerprint of what the forward below stands for."""


def found_source() -> str:
    """Fingerprint of the same function in the installed Transformers."""
    return fingerprint(hf.Qwen3MoeDecoderLayer.forward)


class Qwen3MoeDecoderLayer(hf.Qwen3MoeDecoderLayer):
    """Parameters, name and results of Transformers' class; only its forward is another, checkpointed as its own is."""

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Transformers' own, which computes while ``torch.compile`` traces and where something watches the norm."""
        norm = self.post_attention_layernorm
        options = {
            "attention_mask": attention_mask, "position_ids": position_ids, "cache": cache, "use_cache": use_cache,
            "position_embeddings": position_embeddings, **kwargs,
        }  # fmt: skip
        wide = hidden_states.dtype == torch.float64  # Transformers' norm computes in float32 even then
        if torch.compiler.is_compiling() or wide or not runs_alone(norm):
            return super().forward(hidden_states, **options)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        normed, residual = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
        return residual + self.mlp(normed)


def fuse_residual(model: nn.Module) -> Optimization:
    """Give every layer of Qwen3-MoE the fused forward; on the CPU it runs the kernel's torch reference."""
    return fuse_class(
        model, hf.Qwen3MoeDecoderLayer, Qwen3MoeDecoderLayer, name=NAME, source=found_source(), replaced=REPLACED
    )
