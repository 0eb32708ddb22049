"""The load-balancing loss against Transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from moe_recipes.moe.balance import load_balancing_loss, router_z_loss, update_correction_biases


def test_load_balancing_loss_and_gradient_equal_transformers():
    torch.manual_seed(0)
    ours = [torch.randn(37, 8, requires_grad=True) for _ in range(3)]
    theirs = [logits.detach().clone().requires_grad_() for logits in ours]
    loss = load_balancing_loss(ours, top_k=2)
    expected = load_balancing_loss_func(tuple(theirs), 8, 2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_padding_counts_in_neither_loss():
    torch.manual_seed(0)
    ours = [torch.randn(12, 8, requires_grad=True) for _ in range(3)]
    real = torch.arange(12) % 4 < 3
    loss = load_balancing_loss(ours, top_k=2, real_T=real)
    expected = load_balancing_loss_func(tuple(ours), 8, 2, attention_mask=real.view(3, 4))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, ours), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(router_z_loss(ours, real_T=real), router_z_loss([logits[real] for logits in ours]))


def test_load_balancing_loss_is_one_under_even_probabilities():
    assert float(load_balancing_loss([torch.zeros(16, 4)], top_k=1)) == 1.0


def test_z_loss_is_the_mean_square_of_the_log_partition_summed_over_layers():
    even = torch.full((5, 4), 2.0)  # logsumexp is 2 + ln 4
    assert float(router_z_loss([even, even])) == pytest.approx(2 * (2 + math.log(4)) ** 2)


def test_biases_of_layers_without_tokens_and_of_experts_at_the_mean_stay():
    routers = {}
    for layer in (1, 2, 5):
        routers[layer] = torch.nn.Module()
        routers[layer].register_buffer("e_score_correction_bias", torch.zeros(3))
    counts = torch.tensor([[9, 3, 3], [0, 0, 0], [4, 5, 6]])
    update_correction_biases(routers, [1, 2, 5], counts, rate=0.5)
    biases = [router.e_score_correction_bias.tolist() for router in routers.values()]
    assert biases == [[-0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [0.5, 0.0, -0.5]]
