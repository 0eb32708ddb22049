"""The torch reference of residual sum and norm against Transformers' layer; the kernel: tests/gpu."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_recipes.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from tests.tiny_models import tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_transformers_own(dtype):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=dtype)
    norm = model.model.layers[0].post_attention_layernorm
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 3, 5, 64, dtype=dtype)
    normed, total = add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, norm(residual + x))


def test_gradients_of_the_reference():
    x, residual = (t.requires_grad_() for t in torch.randn(2, 4, 6, dtype=torch.float64))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: add_rms_norm_reference(*inputs, 1e-6), (x, residual, weight))
