"""The torch reference of head norms and rotary embedding against Transformers' modules; the kernel: tests/gpu."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from moe_recipes.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from tests.tiny_models import tiny_config

B, S, QH, KH, D = 2, 7, 4, 2, 16


def projections(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as slices of one fused projection."""
    fused = torch.randn(B, S, (QH + 2 * KH) * D, dtype=dtype)
    q, k, _ = fused.split((QH * D, KH * D, KH * D), dim=-1)
    return q, k


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_transformers_own(dtype):
    """Bit for bit, at positions that start again inside a row."""
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=dtype).model
    attention = model.layers[0].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        torch.nn.init.normal_(norm.weight)
    q, k = projections(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])
    cos, sin = model.rotary_emb(q, positions)
    expected = qwen.apply_rotary_pos_emb(
        attention.q_norm(heads(q)).transpose(1, 2), attention.k_norm(heads(k)).transpose(1, 2), cos, sin
    )
    got = qk_norm_rope(
        q, k, cos, sin, head_dim=D, q_weight_D=attention.q_norm.weight, k_weight_D=attention.k_norm.weight,
        eps=attention.q_norm.variance_epsilon,
    )  # fmt: skip
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine.transpose(1, 2), theirs)


def test_partial_rotary_and_no_norm_are_transformers_own():
    q, k = projections(torch.float32)
    cos, sin = torch.randn(2, B, S, 10)
    expected = glm.apply_rotary_pos_emb(heads(q).transpose(1, 2), heads(k).transpose(1, 2), cos, sin)
    for mine, theirs in zip(qk_norm_rope(q, k, cos, sin, head_dim=D), expected, strict=True):
        assert torch.equal(mine.transpose(1, 2), theirs)


def test_cos_and_sin_may_lack_the_batch():
    q, k = projections(torch.float32)
    cos, sin = torch.randn(2, S, D)
    whole = qk_norm_rope(q, k, cos.expand(B, S, D), sin.expand(B, S, D), head_dim=D)
    for narrow in ((cos, sin), (cos[None], sin[None])):
        for mine, theirs in zip(qk_norm_rope(q, k, *narrow, head_dim=D), whole, strict=True):
            assert torch.equal(mine, theirs)


def test_gradients_of_the_reference():
    q, k = (x.requires_grad_() for x in torch.randn(2, 1, 3, 2 * 6, dtype=torch.float64))
    weights = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)

    def run(q, k, q_weight, k_weight):
        return qk_norm_rope_reference(q, k, cos, sin, head_dim=6, q_weight_D=q_weight, k_weight_D=k_weight)

    assert torch.autograd.gradcheck(run, (q, k, *weights))
