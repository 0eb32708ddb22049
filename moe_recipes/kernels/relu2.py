"""``relu(x) ** 2``, the activation of Nemotron's experts and shared experts, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton


def relu2_reference(x: Tensor) -> Tensor:
    """Any shape; as Transformers' ``relu2``."""
    return F.relu(x).square()


@triton.jit
def _forward_kernel(x, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < count, other=0.0).to(tl.float32), 0.0)
    tl.store(out + at, (value * value).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _backward_kernel(grad, x, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < count, other=0.0).to(tl.float32), 0.0)
    g = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (2 * value * g).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _weighted_backward_kernel(grad, x, weight, slot, act, grad_x, grad_weight, F: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot + row)
    scale = tl.load(weight + place).to(tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        g = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.maximum(tl.load(x + row * F + column, mask=inside, other=0.0).to(tl.float32), 0.0)
        square = value * value
        dot += g * square
        tl.store(act + row * F + column, (scale * square).to(act.dtype.element_ty), mask=inside)
        tl.store(grad_x + row * F + column, (2 * scale * value * g).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + place, tl.sum(dot, axis=0).to(grad_weight.dtype.element_ty))


def weighted_relu2_backward_reference(
    grad_NF: Tensor, x_NF: Tensor, weight_TJ: Tensor, slot_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``weighted_relu2_backward``, one torch operation after the other."""
    dtype = torch.promote_types(grad_NF.dtype, torch.float32)
    positive, grad = F.relu(x_NF.to(dtype)), grad_NF.to(dtype)
    scale_N1 = weight_TJ.reshape(-1)[slot_N].to(dtype).unsqueeze(1)
    grad_weight = torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    grad_weight.view(-1)[slot_N] = (grad * positive.square()).sum(dim=1).to(weight_TJ.dtype)
    act_NF, grad_x_NF = scale_N1 * positive.square(), 2 * scale_N1 * positive * grad
    return act_NF.to(grad_NF.dtype), grad_x_NF.to(x_NF.dtype), grad_weight


def weighted_relu2_backward(
    grad_NF: Tensor, x_NF: Tensor, weight_TJ: Tensor, slot_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.swiglu.weighted_swiglu_backward``, for this activation: its input ``x`` is ``[N, F]``."""
    if not use_triton(grad_NF) or len(grad_NF) == 0:
        return weighted_relu2_backward_reference(grad_NF, x_NF, weight_TJ, slot_N)
    rows, width = grad_NF.shape
    act, grad_x = torch.empty_like(grad_NF), torch.empty_like(x_NF)
    grad_weight = torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    _weighted_backward_kernel[(rows,)](
        grad_NF.contiguous(), x_NF, weight_TJ.contiguous(), slot_N, act, grad_x, grad_weight, width,
        BLOCK=min(1024, power_of_two(width)),
    )  # fmt: skip
    return act, grad_x, grad_weight


BLOCK = 2048


class _ReLU2(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _forward_kernel[(-(-x.numel() // BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _backward_kernel[(-(-x.numel() // BLOCK),)](grad.contiguous(), x, out, x.numel(), BLOCK=BLOCK)
        return out


def relu2(x: Tensor) -> Tensor:
    """Any shape; float32 inside, rounded once on a GPU."""
    if not use_triton(x) or x.numel() == 0:
        return relu2_reference(x)
    return _ReLU2.apply(x)
