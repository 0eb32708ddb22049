"""``silu(gate) * up`` over rows that hold gate and up side by side, in one pass each way."""

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
