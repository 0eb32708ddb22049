"""RMSNorm in one pass each way. Eager Transformers makes about eight, four of them over float32 copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton

TILE_ELEMENTS = 4096
MAX_PROGRAMS = 1024
"""Programs of the backward pass; each adds up one partial gradient of the weight."""


def rms_norm_reference(x_RD: Tensor, weight_D: Tensor, eps: float, *, rounds_first: bool = True) -> Tensor:
    """``weight * (x / rms(x))``, normalised in float32 and rounded to x's dtype: before the weight, as most families
    of Transformers do it, or after it, as Nemotron-H and GPT-OSS do."""
    wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_RD.dtype) if rounds_first else (weight_D.to(wide.dtype) * normed).to(x_RD.dtype)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, out, total, scale, rows, eps,
    ADD: tl.constexpr, ROUND: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < D)
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * D + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + row * D + column, value.to(total.dtype.element_ty), mask=inside)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / D + eps)
    normed = value * inverse
    if ROUND:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (w * normed).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, inverse, mask=row < rows)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, grad_total, x, weight, scale, grad_x, partial, rows,
    ADD: tl.constexpr, ROUND: tl.constexpr, TILES: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(0, TILES):
        row = (program.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < D)
        value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row * D + column, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(scale + row, mask=row < rows, other=0.0)
        normed = value * inverse
        total += g * (normed.to(grad.dtype.element_ty).to(tl.float32) if ROUND else normed)
        gw = g * w
        mean = tl.sum(gw * normed, axis=1, keep_dims=True) / D
        result = inverse * (gw - normed * mean)
        if ADD:
            result += tl.load(grad_total + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * D + column, result.to(grad_x.dtype.element_ty), mask=inside)
    column_1d = tl.arange(0, BLOCK)
    tl.store(partial + program * D + column_1d, tl.sum(total, axis=0), mask=column_1d < D)


def _tile(columns: int) -> tuple[int, int]:
    """Rows a tile holds, and its padded width."""
    block = power_of_two(columns)
    return max(1, TILE_ELEMENTS // block), block


def launch_forward(
    x_RD: Tensor, residual_RD: Tensor | None, weight_D: Tensor, eps: float, *, rounds_first: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of ``x``, or of ``x + residual``: the norm, what was normalised, and float32 ``1 / rms`` of each row.

    Needs Triton and rows side by side.
    """
    rows, columns = x_RD.shape
    out, scale = torch.empty_like(x_RD), torch.empty(rows, dtype=torch.float32, device=x_RD.device)
    total = x_RD if residual_RD is None else torch.empty_like(x_RD)
    tile, block = _tile(columns)
    _forward_kernel[(-(-rows // tile),)](
        x_RD, x_RD if residual_RD is None else residual_RD, weight_D, out, total, scale, rows, eps,
        ADD=residual_RD is not None, ROUND=rounds_first, D=columns, ROWS=tile, BLOCK=block,
    )  # fmt: skip
    return out, total, scale


def launch_backward(
    grad_RD: Tensor, grad_total_RD: Tensor | None, x_RD: Tensor, weight_D: Tensor, scale_R: Tensor, *,
    rounds_first: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the normalised rows, ``grad_total`` added if given, and of the weight."""
    rows, columns = x_RD.shape
    tile, block = _tile(columns)
    tiles = -(-rows // tile)
    # A power of two, so that few variants are compiled.
    tiles_each = power_of_two(-(-tiles // MAX_PROGRAMS))
    programs = -(-tiles // tiles_each)
    grad_x = torch.empty_like(x_RD)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x_RD.device)
    grad_RD = grad_RD.contiguous()
    _backward_kernel[(programs,)](
        grad_RD, grad_RD if grad_total_RD is None else grad_total_RD.contiguous(), x_RD, weight_D, scale_R, grad_x,
        partial, rows, ADD=grad_total_RD is not None, ROUND=rounds_first, TILES=tiles_each,
        D=columns, ROWS=tile, BLOCK=block,
    )  # fmt: skip
    return grad_x, partial.sum(dim=0).to(weight_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_D: Tensor, eps: float, rounds_first: bool) -> Tensor:
        ctx.rounds_first = rounds_first
        out, _, scale = launch_forward(x_RD, None, weight_D, eps, rounds_first=rounds_first)
        ctx.save_for_backward(x_RD, weight_D, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *launch_backward(grad_RD, None, *ctx.saved_tensors, rounds_first=ctx.rounds_first), None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, rounds_first: bool = True) -> Tensor:
    """As the reference, over the last dimension of ``x`` (any shape); the gradient of the weight adds up in float32.

    Keeps ``x`` and one float32 a row for the backward pass.
    """
    if not use_triton(x) or x.numel() == 0 or x.dtype != weight_D.dtype:
        return rms_norm_reference(x, weight_D, eps, rounds_first=rounds_first)
    # The kernel counts on rows side by side; a slice of a wider tensor is not.
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight_D, eps, rounds_first).view(x.shape)
