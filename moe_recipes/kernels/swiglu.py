"""``silu(gate) * up`` in one pass each way: over rows that hold gate and up side by side, or over two tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton


def swiglu_reference(gate_up_N2F: Tensor) -> Tensor:
    """``[N, 2F]`` to ``[N, F]``."""
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(gate_up, out, F, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad, gate_up, out, F, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    g = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = g * gate * sigmoid
    tl.store(out + row * 2 * F + column, grad_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * F + F + column, grad_up.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_backward_kernel(
    grad, gate_up, weight, slot, act, grad_gate_up, grad_weight, F: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot + row)
    scale = tl.load(weight + place).to(tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        g = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dot += g * silu * up
        g *= scale
        grad_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(act + row * F + column, (scale * silu * up).to(act.dtype.element_ty), mask=inside)
        tl.store(grad_gate_up + row * 2 * F + column, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(grad_gate_up + row * 2 * F + F + column, (g * silu).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_weight + place, tl.sum(dot, axis=0).to(grad_weight.dtype.element_ty))


def weighted_swiglu_backward_reference(
    grad_NF: Tensor, gate_up_N2F: Tensor, weight_TJ: Tensor, slot_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``weighted_swiglu_backward``, one torch operation after the other."""
    dtype = torch.promote_types(grad_NF.dtype, torch.float32)
    gate, up = gate_up_N2F.to(dtype).chunk(2, dim=-1)
    scale_N1 = weight_TJ.reshape(-1)[slot_N].to(dtype).unsqueeze(1)
    sigmoid = gate.sigmoid()
    act_NF, grad = gate * sigmoid * up, grad_NF.to(dtype)
    grad_weight = torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    grad_weight.view(-1)[slot_N] = (grad * act_NF).sum(dim=1).to(weight_TJ.dtype)
    grad = grad * scale_N1
    grad_gate_up = torch.cat([grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid], dim=1)
    return (scale_N1 * act_NF).to(grad_NF.dtype), grad_gate_up.to(gate_up_N2F.dtype), grad_weight


def weighted_swiglu_backward(
    grad_NF: Tensor, gate_up_N2F: Tensor, weight_TJ: Tensor, slot_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The elementwise part of the backward pass of ``out[t] = sum_j w[t, j] * act(row(t, j)) @ down``, in one pass.

    No product with ``down`` has to be kept or made again, since ``d loss / d w = <act, grad>``.

    Args:
        grad_NF: gradient of ``act(row) @ down`` before its weight, times ``down`` transposed.
        gate_up_N2F: the input of the activation, gate first.
        weight_TJ: routing weights; ``slot_N``: which of them, flattened, is row n's.
    Returns:
        The weighted activation ``[N, F]``, the gradient of ``gate_up`` ``[N, 2F]``, the gradient of the weights
        ``[T, J]``, 0 for slots without a row.
    """
    if not use_triton(grad_NF) or len(grad_NF) == 0:
        return weighted_swiglu_backward_reference(grad_NF, gate_up_N2F, weight_TJ, slot_N)
    rows, width = grad_NF.shape
    act, grad_gate_up = torch.empty_like(grad_NF), torch.empty_like(gate_up_N2F)
    grad_weight = torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    _weighted_backward_kernel[(rows,)](
        grad_NF.contiguous(),
        gate_up_N2F,
        weight_TJ.contiguous(),
        slot_N,
        act,
        grad_gate_up,
        grad_weight,
        width,
        BLOCK=min(1024, power_of_two(width)),
    )
    return act, grad_gate_up, grad_weight


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone; ``silu`` is computed again in the backward pass, free under the memory traffic."""

    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        gate_up_N2F = gate_up_N2F.contiguous()
        ctx.save_for_backward(gate_up_N2F)
        rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
        out = gate_up_N2F.new_empty(rows, width)
        block = min(1024, power_of_two(width))
        _forward_kernel[(rows, -(-width // block))](gate_up_N2F, out, width, BLOCK=block)
        return out

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (gate_up_N2F,) = ctx.saved_tensors
        rows, width = grad_NF.shape
        out = torch.empty_like(gate_up_N2F)
        block = min(1024, power_of_two(width))
        _backward_kernel[(rows, -(-width // block))](grad_NF.contiguous(), gate_up_N2F, out, width, BLOCK=block)
        return out


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """``silu(gate) * up``: ``[N, 2F]``, gate first, to ``[N, F]``; float32 inside, rounded once on a GPU."""
    if not use_triton(gate_up_N2F) or len(gate_up_N2F) == 0:
        return swiglu_reference(gate_up_N2F)
    return _SwiGLU.apply(gate_up_N2F)


@triton.jit
def _pair_forward_kernel(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _pair_backward_kernel(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    of_gate = value * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), mask=at < count)
    tl.store(grad_up + at, (value * g * sigmoid).to(grad_up.dtype.element_ty), mask=at < count)


_PAIR_BLOCK = 2048


class _SwiGLUPair(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out, count = torch.empty_like(gate), gate.numel()
        _pair_forward_kernel[(-(-count // _PAIR_BLOCK),)](gate, up, out, count, BLOCK=_PAIR_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        _pair_backward_kernel[(-(-count // _PAIR_BLOCK),)](
            grad.contiguous(), gate, up, grad_gate, grad_up, count, BLOCK=_PAIR_BLOCK
        )
        return grad_gate, grad_up


def swiglu_pair(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two tensors of one shape; float32 inside, rounded once on a GPU."""
    if not use_triton(gate) or gate.numel() == 0 or gate.dtype != up.dtype:
        return F.silu(gate) * up
    return _SwiGLUPair.apply(gate, up)
