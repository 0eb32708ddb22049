"""The load-balancing loss against Transformers' own."""

from __future__ import annotations

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from moe_recipes.moe.balance import load_balancing_loss


def test_load_balancing_loss_and_gradient_equal_transformers():
    torch.manual_seed(0)
    ours = [torch.randn(37, 8, requires_grad=True) for _ in range(3)]
    theirs = [logits.detach().clone().requires_grad_() for logits in ours]
    loss = load_balancing_loss(ours, top_k=2)
    expected = load_balancing_loss_func(tuple(theirs), 8, 2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_load_balancing_loss_is_one_under_even_probabilities():
    assert float(load_balancing_loss([torch.zeros(16, 4)], top_k=1)) == 1.0
