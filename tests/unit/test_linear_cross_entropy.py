"""The fused loss against ``F.cross_entropy`` of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe_recipes.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, WORDS = 37, 24, 101


def inputs(dtype: torch.dtype = torch.float32, *, ignored: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Hidden states, projection, bias (leaves), and labels of which a share is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(WORDS, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(WORDS, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < ignored] = -100
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), labels


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def torch_loss(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients(chunk_tokens, with_bias):
    hidden, weight, bias, labels = inputs(torch.float64)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    bias = bias if with_bias else None
    fused = linear_cross_entropy(hidden, weight, labels, bias_V=bias, chunk_tokens=chunk_tokens)
    got = gradients(0.37 * fused, *leaves)
    want = gradients(0.37 * torch_loss(hidden, weight, bias, labels), *leaves)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, bias, _ = inputs(torch.float64)
    leaves = [part.detach().clone().requires_grad_() for part in (hidden[:5, :4], weight[:7, :4], bias[:7])]
    labels = torch.tensor([3, -100, 0, 6, 3])

    def loss(h, w, b):
        return linear_cross_entropy(h, w, labels, bias_V=b, chunk_tokens=2)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_the_gradient_that_is_needed(needed):
    hidden, weight, bias, labels = inputs()
    want = gradients(torch_loss(hidden, weight, bias, labels), (hidden, weight, bias)[needed])
    for index, leaf in enumerate((hidden, weight, bias)):
        leaf.requires_grad_(index == needed)
    leaf = (hidden, weight, bias)[needed]
    got = gradients(linear_cross_entropy(hidden, weight, labels, bias_V=bias, chunk_tokens=8), leaf)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_all_labels_ignored_is_zero_with_zero_gradients():
    hidden, weight, bias, labels = inputs(ignored=2.0)
    got = gradients(linear_cross_entropy(hidden, weight, labels, bias_V=bias, chunk_tokens=8), hidden, weight, bias)
    assert all(float(value.abs().max()) == 0.0 for value in got)


def test_no_token_at_all():
    _, weight, _, _ = inputs()
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    loss, grad = gradients(linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64)), weight)
    assert (float(loss), float(grad.abs().max())) == (0.0, 0.0)


def test_large_logits_do_not_overflow():
    hidden, weight, bias, labels = inputs()
    hidden = (hidden.detach() * 1000).requires_grad_()
    got = gradients(linear_cross_entropy(hidden, weight, labels, bias_V=bias), hidden, weight)
    want = gradients(torch_loss(hidden, weight, bias, labels), hidden, weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)


def test_bfloat16_is_as_near_to_float64_as_whole_logits_are():
    exact = inputs(torch.bfloat16)
    labels = exact[3]
    wide = [leaf.detach().double().requires_grad_() for leaf in exact[:3]]
    truth = gradients(torch_loss(*wide, labels), *wide)
    got = gradients(linear_cross_entropy(*exact[:2], labels, bias_V=exact[2], chunk_tokens=8), *exact[:3])
    hidden, weight, bias = exact[:3]
    plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=-100, reduction="sum")
    whole = gradients(plain, *exact[:3])
    for value, other, expected in zip(got, whole, truth, strict=True):
        error = (value.double() - expected).norm() / expected.norm()
        assert error <= 1.2 * (other.double() - expected).norm() / expected.norm() + 1e-3


def test_bfloat16_gradients_scale_exactly_with_the_loss():
    """1/label count is no bfloat16 number: rounding it would change every gradient by the same up to 0.4 %."""
    hidden, weight, _, labels = inputs(torch.bfloat16)
    one = gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)[1:]
    scaled = gradients(0.3 * linear_cross_entropy(hidden, weight, labels), hidden, weight)[1:]
    for value, unit in zip(scaled, one, strict=True):
        ratio = float((value.double() * unit.double()).sum() / unit.double().square().sum())
        assert abs(ratio / 0.3 - 1) < 2e-4


def test_without_gradients_only_the_logits_are_computed():
    hidden, weight, bias, labels = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(hidden, weight, labels, bias_V=bias, chunk_tokens=8)
    torch.testing.assert_close(loss, torch_loss(hidden, weight, bias, labels).detach(), check_dtype=False)
    assert counter.get_total_flops() == 2 * hidden.shape[0] * weight.numel()
