"""Moving rows between tokens and their routed copies: gather, and weighted sum back. No atomics, so repeatable.

A ``RowMap`` ties N rows to the J slots of T tokens (J = experts a token picks, or ranks a token goes to):

    slot_N    which slot, t * J + j, row n was made for
    row_TJ    which row slot (t, j) became, or -1 if it has none

``take_rows`` and ``sum_rows`` are each other's backward, so both directions read every row once. On a GPU each is one
Triton kernel that moves the bytes once; the torch versions beside them are the reference and serve the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton


@dataclass(frozen=True, kw_only=True)
class RowMap:
    """Integers only; int64 on the rows' device."""

    slot_N: Tensor
    row_TJ: Tensor

    @property
    def token_N(self) -> Tensor:
        return self.slot_N // self.row_TJ.shape[1]


def make_row_map(slot_N: Tensor, *, num_tokens: int, num_slots: int) -> RowMap:
    """Invert ``slot_N`` (each slot at most once)."""
    row = slot_N.new_full((num_tokens * num_slots,), -1)
    row[slot_N] = torch.arange(len(slot_N), device=slot_N.device)
    return RowMap(slot_N=slot_N, row_TJ=row.view(num_tokens, num_slots))


def sum_rows_reference(rows_ND: Tensor, row_TJ: Tensor, weight_TJ: Tensor | None) -> Tensor:
    """Per token the (weighted) sum of its rows, accumulated in float32: ``[T, D]`` in the rows' dtype."""
    accumulate = torch.promote_types(rows_ND.dtype, torch.float32)
    out_TD = rows_ND.new_zeros(row_TJ.shape[0], rows_ND.shape[1], dtype=accumulate)
    if len(rows_ND) == 0:
        return out_TD.to(rows_ND.dtype)
    for j in range(row_TJ.shape[1]):  # one slot at a time: gathering all J at once would hold J copies of the tokens
        present_T = row_TJ[:, j] >= 0
        scale_T = present_T.to(accumulate) if weight_TJ is None else weight_TJ[:, j].to(accumulate) * present_T
        out_TD.addcmul_(rows_ND[row_TJ[:, j].clamp(min=0)], scale_T.unsqueeze(1))
    return out_TD.to(rows_ND.dtype)


def sum_rows_backward_reference(
    grad_TD: Tensor, y_ND: Tensor, weight_TJ: Tensor, rows: RowMap
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted sum: of the rows ``[N, D]`` and of the weights ``[T, J]``."""
    accumulate = torch.promote_types(y_ND.dtype, torch.float32)
    grad_rows_ND = grad_TD.index_select(0, rows.token_N).to(accumulate)
    grad_weight = torch.zeros_like(weight_TJ).view(-1)
    grad_weight[rows.slot_N] = (y_ND.to(accumulate) * grad_rows_ND).sum(dim=1).to(weight_TJ.dtype)
    weight_N1 = weight_TJ.reshape(-1)[rows.slot_N].unsqueeze(1)
    return (grad_rows_ND * weight_N1).to(y_ND.dtype), grad_weight.view_as(weight_TJ)


@triton.jit
def _take_kernel(x, slot, out, D, J: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(slot + row) // J
    value = tl.load(x + token * D + column, mask=column < D)
    tl.store(out + row * D + column, value, mask=column < D)


@triton.jit
def _sum_kernel(y, row_of, weight, out, D, J: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(J):
        row = tl.load(row_of + token * J + j)
        scale = tl.load(weight + token * J + j).to(tl.float32) if WEIGHTED else 1.0
        value = tl.load(y + row * D + column, mask=(column < D) & (row >= 0), other=0.0).to(tl.float32)
        total += scale * value
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _sum_backward_kernel(
    grad, y, weight, slot, grad_y, grad_weight, D: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot + row)
    scale = tl.load(weight + place).to(tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        g = tl.load(grad + (place // J) * D + column, mask=column < D, other=0.0).to(tl.float32)
        value = tl.load(y + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        dot += g * value
        tl.store(grad_y + row * D + column, (g * scale).to(grad_y.dtype.element_ty), mask=column < D)
    tl.store(grad_weight + place, tl.sum(dot, axis=0).to(grad_weight.dtype.element_ty))


def _blocks(columns: int) -> tuple[int, int]:
    """Block width, and how many cover a row."""
    block = min(1024, power_of_two(columns))
    return block, -(-columns // block)


def gather_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """``take_rows`` without autograd."""
    if not use_triton(x_TD) or len(rows.slot_N) == 0:
        return x_TD.index_select(0, rows.token_N)
    x_TD, columns = x_TD.contiguous(), x_TD.shape[1]
    out = x_TD.new_empty(len(rows.slot_N), columns)
    block, count = _blocks(columns)
    _take_kernel[(len(out), count)](x_TD, rows.slot_N, out, columns, J=rows.row_TJ.shape[1], BLOCK=block)
    return out


def _sum(y_ND: Tensor, row_TJ: Tensor, weight_TJ: Tensor | None) -> Tensor:
    if not use_triton(y_ND) or len(row_TJ) == 0 or len(y_ND) == 0:
        return sum_rows_reference(y_ND, row_TJ, weight_TJ)
    y_ND, columns = y_ND.contiguous(), y_ND.shape[1]
    out = y_ND.new_empty(len(row_TJ), columns)
    block, count = _blocks(columns)
    weighted = weight_TJ is not None
    weight = weight_TJ.contiguous() if weight_TJ is not None else y_ND
    _sum_kernel[(len(out), count)](
        y_ND, row_TJ, weight, out, columns, J=row_TJ.shape[1], WEIGHTED=weighted, BLOCK=block
    )
    return out


def _sum_backward(grad_TD: Tensor, y_ND: Tensor, weight_TJ: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
    if not use_triton(y_ND) or len(y_ND) == 0:
        return sum_rows_backward_reference(grad_TD, y_ND, weight_TJ, rows)
    grad_y, grad_weight = torch.empty_like(y_ND), torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    block, _ = _blocks(y_ND.shape[1])
    _sum_backward_kernel[(len(y_ND),)](
        grad_TD.contiguous(),
        y_ND,
        weight_TJ.contiguous(),
        rows.slot_N,
        grad_y,
        grad_weight,
        y_ND.shape[1],
        J=weight_TJ.shape[1],
        BLOCK=block,
    )
    return grad_y, grad_weight


def weighted_row_sum(y_ND: Tensor, rows: RowMap, weight_TJ: Tensor | None) -> Tensor:
    """``sum_rows`` without autograd."""
    return _sum(y_ND, rows.row_TJ, weight_TJ)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return gather_rows(x_TD, rows)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_ND, ctx.rows.row_TJ, None), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_TJ: Tensor | None, rows: RowMap) -> Tensor:
        ctx.rows = rows
        y_ND = y_ND.contiguous()
        ctx.save_for_backward(y_ND if weight_TJ is not None else None, weight_TJ)
        return _sum(y_ND, rows.row_TJ, weight_TJ)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y_ND, weight_TJ = ctx.saved_tensors
        if weight_TJ is None:
            return gather_rows(grad_TD, ctx.rows), None, None
        return *_sum_backward(grad_TD, y_ND, weight_TJ, ctx.rows), None


def take_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Row n is a copy of token ``rows.token_N[n]``: ``[N, D]``."""
    return _TakeRows.apply(x_TD, rows)


def sum_rows(y_ND: Tensor, rows: RowMap, *, weight_TJ: Tensor | None = None) -> Tensor:
    """Token t is the sum of its rows, each times its weight if given; float32 inside: ``[T, D]`` in y's dtype."""
    return _SumRows.apply(y_ND, weight_TJ, rows)
