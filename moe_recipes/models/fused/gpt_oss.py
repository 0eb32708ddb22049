"""GPT-OSS's attention with its rotary embedding in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss import modeling_gpt_oss as hf
from transformers.utils.deprecation import deprecate_kwarg

from moe_recipes.kernels.rope import rope
from moe_recipes.models.blocks import fingerprint, fuse_class, modules_of_class
from moe_recipes.runtime.optimizations import Optimization

NAME = "fused rotary embedding"
REPLACED = "5d8dc28703939be0"
"""Fingerprint of what the forward below stands for."""


def found_source() -> str:
    """Fingerprint of the same functions in the installed Transformers."""
    return fingerprint(hf.GptOssAttention.forward, hf.apply_rotary_pos_emb, hf._apply_rotary_emb)


class GptOssAttention(hf.GptOssAttention):
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
        """As Transformers' own, which computes while ``torch.compile`` traces."""
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        rows, length = hidden_states.shape[:2]
        angles = [angle.expand(rows, -1, -1).flatten(0, 1) for angle in position_embeddings]
        query, key, value = (
            project(hidden_states).view(rows * length, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        states = [rope(query, *angles), rope(key, *angles), value]
        query, key, value = (tensor.view(rows, length, -1, self.head_dim).transpose(1, 2) for tensor in states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, hf.eager_attention_forward)
        out, weights = attend(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
            sliding_window=self.sliding_window, s_aux=self.sinks, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.reshape(rows, length, -1).contiguous()), weights


def fuse_gpt_oss(model: nn.Module) -> Optimization | None:
    """Give every attention of GPT-OSS the fused forward; None where the model has none. On the CPU it runs the
    kernel's torch reference."""
    if not modules_of_class(model, hf.GptOssAttention):
        return None
    return fuse_class(model, hf.GptOssAttention, GptOssAttention, name=NAME, source=found_source(), replaced=REPLACED)
