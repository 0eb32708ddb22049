"""Rows that travel between ranks through memory that every rank of a group can write: no collective, no host.

Each rank owns equal regions; a region for rows has room for P x C of them, C tokens from each of P ranks. What rank s
sends of its token t lies at row ``s * C + t`` of the receiver, so nobody has to agree on where a row goes:

    push_rows       token t's row to every rank that holds one of its experts, once a rank; choices and weights to all
    combine_rows    the (weighted) sum of a token's routed rows on this rank, straight into the token's own rank
    collect_rows    token t is the sum over the ranks that it went to

A kernel finds the other ranks' regions by address. The torch versions beside the kernels are the reference: they write
through views of the regions, one for each rank, and take the place of the kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_recipes.kernels.rows import sum_rows_reference
from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton

NOWHERE = -1
"""In place of a chosen expert: this slot goes to no rank."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """The same piece of every rank's memory."""

    views: Sequence[Tensor]
    """This process's view of each rank's piece, by rank: ``[P * C, columns]``."""

    pointers_P: Tensor
    """int64, on the device of the rows: each rank's address of the piece."""


@triton.jit
def _goes_to(chosen, p: tl.constexpr, experts: tl.constexpr):  # type: ignore[no-untyped-def]
    """True if one of a token's chosen experts lives on rank p."""
    return tl.sum(((chosen >= p * experts) & (chosen < (p + 1) * experts)).to(tl.int32), axis=0) > 0


@triton.jit
def _push_kernel(
    x, y, index, weight, x_pointers, y_pointers, index_pointers, weight_pointers, me, num_tokens, C, D,
    experts: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, P: tl.constexpr, TWO: tl.constexpr,
    ROUTES: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    present = token < num_tokens
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < D) & present
    slot = tl.arange(0, K2)
    chosen = tl.load(index + token * K + slot, mask=(slot < K) & present, other=-1)
    place = me * C + token
    x_value = tl.load(x + token * D + column, mask=inside)
    y_value = tl.load(y + token * D + column, mask=inside & TWO)
    for p in tl.static_range(P):
        goes = _goes_to(chosen, p, experts)
        x_there = tl.multiple_of(tl.load(x_pointers + p).to(tl.pointer_type(x.dtype.element_ty)), 16)
        tl.store(x_there + place * D + column, x_value, mask=inside & goes)
        if TWO:
            y_there = tl.multiple_of(tl.load(y_pointers + p).to(tl.pointer_type(y.dtype.element_ty)), 16)
            tl.store(y_there + place * D + column, y_value, mask=inside & goes)
    if tl.program_id(1) == 0:
        scale = tl.load(weight + token * K + slot, mask=(slot < K) & present, other=0.0)
        for p in tl.static_range(P):
            weight_there = tl.load(weight_pointers + p).to(tl.pointer_type(weight.dtype.element_ty))
            tl.store(weight_there + place * K + slot, scale, mask=slot < K)
            if ROUTES:
                index_there = tl.load(index_pointers + p).to(tl.pointer_type(tl.int32))
                tl.store(index_there + place * K + slot, chosen.to(tl.int32), mask=slot < K)


@triton.jit
def _combine_kernel(
    y, row_of, weight, grad_weight, pointers, grad_pointers, me, C, D, K: tl.constexpr, K2: tl.constexpr,
    WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    here = 0
    for k in tl.static_range(K):
        row = tl.load(row_of + place * K + k)
        here += (row >= 0).to(tl.int32)
        scale = tl.load(weight + place * K + k).to(tl.float32) if WEIGHTED else 1.0
        value = tl.load(y + row * D + column, mask=(column < D) & (row >= 0), other=0.0).to(tl.float32)
        total += scale * value
    source = place // C
    to = me * C + place % C
    there = tl.multiple_of(tl.load(pointers + source).to(tl.pointer_type(y.dtype.element_ty)), 16)
    tl.store(there + to * D + column, total.to(y.dtype.element_ty), mask=(column < D) & (here > 0))
    if GRADIENT and tl.program_id(1) == 0:
        slot = tl.arange(0, K2)
        gradient = tl.load(grad_weight + place * K + slot, mask=slot < K)
        gradient_there = tl.load(grad_pointers + source).to(tl.pointer_type(grad_weight.dtype.element_ty))
        tl.store(gradient_there + to * K + slot, gradient, mask=(slot < K) & (here > 0))


@triton.jit
def _collect_kernel(
    rows, index, grads, out, out_weight, C, D, experts: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    P: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, K2)
    chosen = tl.load(index + token * K + slot, mask=slot < K, other=-1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for p in tl.static_range(P):
        goes = _goes_to(chosen, p, experts)
        value = tl.load(rows + (p * C + token) * D + column, mask=(column < D) & goes, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)
    if GRADIENT and tl.program_id(1) == 0:
        chosen_here = (slot < K) & (chosen >= 0)
        owner = (chosen // experts).to(tl.int64)
        gradient = tl.load(grads + (owner * C + token) * K + slot, mask=chosen_here, other=0.0)
        tl.store(out_weight + token * K + slot, gradient, mask=slot < K)


def _blocks(columns: int) -> tuple[int, int]:
    """Block width, and how many cover a row."""
    block = min(1024, power_of_two(columns))
    return block, -(-columns // block)


def _push_reference(
    rows: Sequence[tuple[Tensor, Region]], index_TK: Tensor, weight_TK: Tensor, weight_to: Region,
    index_to: Region | None, *, me: int, num_local_experts: int,
) -> None:  # fmt: skip
    num_tokens, room = len(index_TK), len(weight_to.views[0]) // len(weight_to.views)
    own, present = slice(me * room, (me + 1) * room), slice(me * room, me * room + num_tokens)
    for p in range(len(weight_to.views)):
        goes_T = (index_TK // num_local_experts == p).any(dim=1)
        for x_TD, to in rows:
            to.views[p][present][goes_T] = x_TD[goes_T]
        weight_to.views[p][own] = 0
        weight_to.views[p][present] = weight_TK
        if index_to is not None:
            index_to.views[p][own] = NOWHERE
            index_to.views[p][present] = index_TK.to(torch.int32)


def push_rows(
    rows: Sequence[tuple[Tensor, Region]], index_TK: Tensor, weight_TK: Tensor, weight_to: Region,
    index_to: Region | None = None, *, me: int, num_local_experts: int,
) -> None:  # fmt: skip
    """Store each token's row on every rank that holds one of its chosen experts, once a rank, at row ``me * C + t``;
    the routing weights, and where they are not there yet the choices, on every rank.

    Args:
        rows: one or two ``[T, D]`` of the same shape and dtype, each with where it goes. T may be below C: rows beyond
            it keep their bytes, choices beyond it become ``NOWHERE`` and weights 0, so that a rank with fewer tokens
            leaves none of an earlier call's.
        index_TK: int64 global expert ids; ``index_to``: int32.
    """
    ranks, (num_tokens, top_k) = len(weight_to.views), index_TK.shape
    room = len(weight_to.views[0]) // ranks
    (x, x_to), (y, y_to) = rows[0], rows[-1]
    if not use_triton(x):
        _push_reference(
            rows, index_TK, weight_TK, weight_to, index_to, me=me, num_local_experts=num_local_experts
        )  # fmt: skip
        return
    block, count = _blocks(x.shape[1])
    index_pointers = weight_to.pointers_P if index_to is None else index_to.pointers_P
    _push_kernel[(room, count)](
        x.contiguous(), y.contiguous(), index_TK.contiguous(), weight_TK.contiguous(), x_to.pointers_P,
        y_to.pointers_P, index_pointers, weight_to.pointers_P, me, num_tokens, room, x.shape[1],
        experts=num_local_experts, K=top_k, K2=power_of_two(top_k), P=ranks, TWO=len(rows) > 1,
        ROUTES=index_to is not None, BLOCK=block,
    )  # fmt: skip


def combine_rows(
    y_ND: Tensor,
    row_GK: Tensor,
    to: Region,
    *,
    me: int,
    weight_GK: Tensor | None = None,
    grad_weight_GK: Tensor | None = None,
    grad_to: Region | None = None,
) -> None:
    """Store each token's (weighted) sum of routed rows on the rank it came from, at row ``me * C + t``.

    Args:
        row_GK: int64, G = P * C: which routed row slot k of token t of rank s became, at ``s * C + t``; -1 for none.
        grad_weight_GK, grad_to: gradients of the routing weights, which travel beside the rows.
    """
    ranks, columns = len(to.views), y_ND.shape[1]
    num_places, top_k = row_GK.shape
    room = num_places // ranks
    if not use_triton(y_ND):
        here_G = (row_GK >= 0).any(dim=1)
        sum_GD = sum_rows_reference(y_ND, row_GK, None if weight_GK is None else weight_GK[:num_places])
        for source in range(ranks):
            here, rows = here_G[source * room :][:room], slice(source * room, (source + 1) * room)
            to.views[source][me * room : (me + 1) * room][here] = sum_GD[rows][here]
            if grad_weight_GK is not None and grad_to is not None:
                grad_to.views[source][me * room : (me + 1) * room][here] = grad_weight_GK[rows][here]
        return
    block, count = _blocks(columns)
    weight = y_ND if weight_GK is None else weight_GK
    gradient, grad_pointers = (y_ND, to.pointers_P)
    if grad_weight_GK is not None and grad_to is not None:
        gradient, grad_pointers = grad_weight_GK, grad_to.pointers_P
    _combine_kernel[(num_places, count)](
        y_ND, row_GK, weight, gradient, to.pointers_P, grad_pointers, me, room, columns, K=top_k,
        K2=power_of_two(top_k), WEIGHTED=weight_GK is not None, GRADIENT=grad_weight_GK is not None, BLOCK=block,
    )  # fmt: skip


def collect_rows(
    rows_GD: Tensor, index_TK: Tensor, *, num_ranks: int, num_local_experts: int, grad_GK: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What came back: each token's sum over the ranks that it went to ``[T, D]``, and where ``grad_GK`` is given the
    gradients of its routing weights ``[T, K]``, each from the rank that owns the expert."""
    (num_tokens, top_k), columns = index_TK.shape, rows_GD.shape[1]
    room = len(rows_GD) // num_ranks
    if not use_triton(rows_GD):
        ranks_P = torch.arange(num_ranks, device=index_TK.device)
        owner_TK = index_TK // num_local_experts
        token_T = torch.arange(num_tokens, device=index_TK.device)
        goes_TP = (owner_TK[:, :, None] == ranks_P).any(dim=1)
        row_TP = torch.where(goes_TP, ranks_P * room + token_T[:, None], -1)
        out = sum_rows_reference(rows_GD, row_TP, None)
        if grad_GK is None:
            return out, None
        return out, grad_GK[owner_TK * room + token_T[:, None], torch.arange(top_k, device=index_TK.device)]
    out = rows_GD.new_empty(num_tokens, columns)
    grad = rows_GD if grad_GK is None else grad_GK
    out_weight = grad.new_empty(num_tokens, top_k)
    if num_tokens:
        block, count = _blocks(columns)
        _collect_kernel[(num_tokens, count)](
            rows_GD, index_TK, grad, out, out_weight, room, columns, experts=num_local_experts, K=top_k,
            K2=power_of_two(top_k), P=num_ranks, GRADIENT=grad_GK is not None, BLOCK=block,
        )  # fmt: skip
    return out, None if grad_GK is None else out_weight
