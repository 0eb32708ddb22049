"""Activations, a norm and a rotary embedding in Triton, beside autograd in float64.

Where there is no GPU but Triton, ``TRITON_INTERPRET=1`` runs the same tests on the CPU in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_recipes.kernels.clamped_swiglu import ClampedSwiglu, clamped_swiglu, weighted_clamped_swiglu_backward
from moe_recipes.kernels.relu2 import relu2, weighted_relu2_backward
from moe_recipes.kernels.rms_norm import rms_norm, rms_norm_reference
from moe_recipes.kernels.rope import rope, rope_reference
from moe_recipes.kernels.swiglu import swiglu_pair
from moe_recipes.kernels.triton import HAVE_TRITON, INTERPRETED

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not (HAVE_TRITON and INTERPRETED), reason="needs a CUDA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [48, 1500] if CUDA else [24, 1030]
ROWS, TOKENS, SLOTS, EXPERTS = 13, 9, 3, 4
NUMBERS = ClampedSwiglu(alpha=1.702, limit=2.0)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def tolerance(dtype: torch.dtype) -> float:
    """One rounding of the result; the interpreter cuts bfloat16 off instead."""
    return 1e-6 if dtype == torch.float32 else 4e-3 if CUDA else 8e-3


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in wanted]
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < tolerance(dtype)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_relu2(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = random(ROWS, 5, width, dtype=dtype).requires_grad_()
    grad = random(ROWS, 5, width, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    out, wanted = relu2(x), F.relu(wide).square()
    close((out, *torch.autograd.grad(out, x, grad)), (wanted, *torch.autograd.grad(wanted, wide, grad.double())), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_of_two_tensors(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pair = [random(ROWS, 5, width, dtype=dtype).requires_grad_() for _ in range(2)]
    grad = random(ROWS, 5, width, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in pair]
    out, wanted = swiglu_pair(*pair), F.silu(wide[0]) * wide[1]
    close(
        (out, *torch.autograd.grad(out, pair, grad)), (wanted, *torch.autograd.grad(wanted, wide, grad.double())), dtype
    )


def weighted(act: Callable[[Tensor], Tensor], hidden: Tensor, grad: Tensor, weight: Tensor, slot: Tensor) -> tuple:
    """Weighted activation, its gradients by the hidden rows and by the weights, all in float64 by autograd."""
    wide, weights = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    out = weights.flatten()[slot].unsqueeze(1) * act(wide)
    return out.detach(), *torch.autograd.grad(out, (wide, weights), grad.double())


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_weighted_backward_of_relu2(width: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slot = torch.randperm(TOKENS * SLOTS, device=DEVICE)[:ROWS]
    weight = torch.rand(TOKENS, SLOTS, device=DEVICE).to(weight_dtype)
    x, grad = random(ROWS, width, dtype=dtype), random(ROWS, width, dtype=dtype)
    found = weighted_relu2_backward(grad, x, weight, slot)
    close(found[:2], (wanted := weighted(lambda v: F.relu(v).square(), x, grad, weight, slot))[:2], dtype)
    close(found[2:], wanted[2:], weight_dtype)


def clamped_gate(hidden: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
    """As GPT-OSS's model code has it."""
    row = hidden + bias[expert.long()]
    gate, up = row[..., ::2].clamp(max=NUMBERS.limit), row[..., 1::2].clamp(-NUMBERS.limit, NUMBERS.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * NUMBERS.alpha))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_clamped_swiglu_with_bias(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slot = torch.randperm(TOKENS * SLOTS, device=DEVICE)[:ROWS]
    weight = torch.rand(TOKENS, SLOTS, device=DEVICE).to(dtype)
    hidden, bias = random(ROWS, 2 * width, dtype=dtype, scale=2), random(EXPERTS, 2 * width, dtype=dtype)
    expert = torch.randint(0, EXPERTS, (ROWS,), device=DEVICE, dtype=torch.int32)
    row = hidden.float() + bias.float()[expert.long()]
    assert all((part > NUMBERS.limit).any() and (part < NUMBERS.limit).any() for part in (row[:, ::2], row[:, 1::2]))
    assert (row[:, 1::2] < -NUMBERS.limit).any()
    grad = random(ROWS, width, dtype=dtype)
    out = clamped_swiglu(hidden, bias, expert, NUMBERS)
    close((out,), (clamped_gate(hidden.double(), bias.double(), expert),), dtype)
    found = weighted_clamped_swiglu_backward(grad, hidden, weight, slot, bias, expert, NUMBERS)
    close(found, weighted(lambda v: clamped_gate(v, bias.double(), expert), hidden, grad, weight, slot), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 48), (5, 2688)])
def test_norm_that_rounds_after_its_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = random(*shape, dtype=dtype).requires_grad_(), random(shape[1], dtype=dtype).requires_grad_()
    grad = random(*shape, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    out, wanted = rms_norm(x, weight, 1e-6, rounds_first=False), rms_norm_reference(*wide, 1e-6, rounds_first=False)
    found = (out, *torch.autograd.grad(out, (x, weight), grad))
    close(found, (wanted, *torch.autograd.grad(wanted, wide, grad.double())), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(3, 20), (64, 64)])
def test_rotary_embedding(heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = random(ROWS, heads + 2, width, dtype=dtype).requires_grad_()
    angles = [random(ROWS, width // 2, dtype=dtype) for _ in range(2)]
    grad = random(ROWS, heads, width, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    out = rope(x[:, :heads], *angles)  # heads of a wider projection
    wanted = rope_reference(wide[:, :heads], *(angle.double() for angle in angles))
    close((out, *torch.autograd.grad(out, x, grad)), (wanted, *torch.autograd.grad(wanted, wide, grad.double())), dtype)
