"""DeepSeek-V3's attention with its queries and keys put together in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf
from transformers.utils.deprecation import deprecate_kwarg

from moe_recipes.kernels.mla_heads import mla_heads
from moe_recipes.models.blocks import fingerprint, fuse_class, modules_of_class
from moe_recipes.runtime.optimizations import Optimization

NAME = "fused heads of latent attention"
REPLACED = "567c2a5c552e29d4"
"""Fingerprint of what the forward below stands for."""


def found_source() -> str:
    """Fingerprint of the same functions in the installed Transformers."""
    kind = hf.DeepseekV3Attention
    return fingerprint(kind.forward, kind.expand_kv, hf.apply_rotary_pos_emb_interleave)


class DeepseekV3Attention(hf.DeepseekV3Attention):
    """Parameters, name and results of Transformers' class; only its forward is another."""

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Transformers' own, which computes with a cache, while ``torch.compile`` traces and with rotary channels
        in halves."""
        if torch.compiler.is_compiling() or cache is not None or not self.config.rope_interleave:
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        rows, length = hidden_states.shape[:2]
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        latent, shared = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))
        cos, sin = (angle.expand(rows, -1, -1).flatten(0, 1) for angle in position_embeddings)
        heads = mla_heads(
            query.view(rows * length, self.num_heads, -1), key_value.view(rows * length, self.num_heads, -1),
            shared.flatten(0, 1), cos, sin, nope=self.qk_nope_head_dim,
        )  # fmt: skip
        attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, hf.eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        states = [tensor.view(rows, length, self.num_heads, -1).transpose(1, 2) for tensor in heads]
        out, weights = attend(self, *states, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(rows, length, -1).contiguous()), weights


def fuse_mla(model: nn.Module) -> Optimization | None:
    """Give every attention of DeepSeek-V3 the fused forward; None where the model has none. On the CPU it runs the
    kernel's torch reference."""
    if not modules_of_class(model, hf.DeepseekV3Attention):
        return None
    return fuse_class(
        model, hf.DeepseekV3Attention, DeepseekV3Attention, name=NAME, source=found_source(), replaced=REPLACED
    )
