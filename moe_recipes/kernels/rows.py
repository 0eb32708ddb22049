"""Moving rows between tokens and their routed copies: gather, and weighted sum back. No atomics, so repeatable.

A ``RowMap`` ties N rows to the J slots of T tokens (J = experts a token picks, or ranks a token goes to):

    slot_N    which slot, t * J + j, row n was made for
    row_TJ    which row slot (t, j) became, or -1 if it has none

``take_rows`` and ``sum_rows`` are each other's backward, so both directions read every row once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def _sum_rows(rows_ND: Tensor, row_TJ: Tensor, weight_TJ: Tensor | None) -> Tensor:
    """Per token the (weighted) sum of its rows, accumulated in float32: ``[T, D]`` in the rows' dtype."""
    out_TD = rows_ND.new_zeros(row_TJ.shape[0], rows_ND.shape[1], dtype=torch.float32)
    if len(rows_ND) == 0:
        return out_TD.to(rows_ND.dtype)
    for j in range(row_TJ.shape[1]):  # one slot at a time: gathering all J at once would hold J copies of the tokens
        present_T = row_TJ[:, j] >= 0
        scale_T = present_T.float() if weight_TJ is None else weight_TJ[:, j].float() * present_T
        out_TD.addcmul_(rows_ND[row_TJ[:, j].clamp(min=0)], scale_T.unsqueeze(1))
    return out_TD.to(rows_ND.dtype)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grad_ND, ctx.rows.row_TJ, None), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_TJ: Tensor | None, rows: RowMap) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(y_ND if weight_TJ is not None else None, weight_TJ)
        return _sum_rows(y_ND, rows.row_TJ, weight_TJ)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y_ND, weight_TJ = ctx.saved_tensors
        grad_rows_ND = grad_TD.index_select(0, ctx.rows.token_N)
        if weight_TJ is None:
            return grad_rows_ND, None, None
        dot_N = (y_ND.float() * grad_rows_ND.float()).sum(dim=1)
        grad_weight = torch.zeros_like(weight_TJ).view(-1)
        grad_weight[ctx.rows.slot_N] = dot_N.to(weight_TJ.dtype)
        weight_N1 = weight_TJ.reshape(-1)[ctx.rows.slot_N].unsqueeze(1)
        return (grad_rows_ND * weight_N1).to(y_ND.dtype), grad_weight.view_as(weight_TJ), None


def take_rows(x_TD: Tensor, rows: RowMap) -> Tensor:
    """Row n is a copy of token ``rows.token_N[n]``: ``[N, D]``."""
    return _TakeRows.apply(x_TD, rows)


def sum_rows(y_ND: Tensor, rows: RowMap, *, weight_TJ: Tensor | None = None) -> Tensor:
    """Token t is the sum of its rows, each times its weight if given; float32 inside: ``[T, D]`` in y's dtype."""
    return _SumRows.apply(y_ND, weight_TJ, rows)
