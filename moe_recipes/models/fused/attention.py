"""Qwen3-MoE's attention with the norms of its heads and the rotary embedding in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf
from transformers.utils.deprecation import deprecate_kwarg

from moe_recipes.kernels.qk_norm_rope import DTYPES, qk_norm_rope
from moe_recipes.models.blocks import fingerprint, fuse_class
from moe_recipes.models.fused.norms import runs_alone
from moe_recipes.runtime.optimizations import Optimization

NAME = "fused q/k norm and rotary embedding"
REPLACED = "f339e7d5bacce961"
"""Fingerprint of what the forward below stands for."""


def found_source() -> str:
    """Fingerprint of the same functions in the installed Transformers."""
    return fingerprint(hf.Qwen3MoeAttention.forward, hf.apply_rotary_pos_emb, hf.rotate_half)


class Qwen3MoeAttention(hf.Qwen3MoeAttention):
    """Parameters, name and results of Transformers' class; only its forward is another."""

    def _fits(self, hidden_states: Tensor) -> bool:
        q_norm, k_norm = self.q_norm, self.k_norm
        plain = runs_alone(q_norm) and runs_alone(k_norm) and q_norm.variance_epsilon == k_norm.variance_epsilon
        return plain and hidden_states.dtype in DTYPES

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Transformers' own, which computes while ``torch.compile`` traces and where something watches the norms."""
        if torch.compiler.is_compiling() or not self._fits(hidden_states):
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        shape = hidden_states.shape[:-1]
        query, key = qk_norm_rope(
            self.q_proj(hidden_states), self.k_proj(hidden_states), *position_embeddings, head_dim=self.head_dim,
            q_weight_D=self.q_norm.weight, k_weight_D=self.k_norm.weight, eps=self.q_norm.variance_epsilon,
        )  # fmt: skip
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, hf.eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, attention_mask,
            dropout=dropout, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights


def fuse_attention(model: nn.Module) -> Optimization:
    """Give every attention of Qwen3-MoE the fused forward; on the CPU it runs the kernel's torch reference."""
    return fuse_class(
        model, hf.Qwen3MoeAttention, Qwen3MoeAttention, name=NAME, source=found_source(), replaced=REPLACED
    )
