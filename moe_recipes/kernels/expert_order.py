"""The order of routed rows by expert, found on the device: a counting sort in three passes, stable, without atomics.

The pairs (row g, slot k) of a ``[G, K]`` table of chosen experts are taken in blocks. Each block counts its experts,
the counts are summed up over the blocks, and each pair then knows its place: start of its expert, plus what earlier
blocks have of it, plus what its own block has of it so far. A general sort makes about ten passes for the same, and
the host would have to say how many pairs there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton

PAIRS_A_BLOCK = 128


@triton.jit
def _count_kernel(index, counts, num_pairs, first, experts: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + pair, mask=pair < num_pairs, other=-1).to(tl.int32) - first
    columns = tl.arange(0, E2)
    mine = (expert[:, None] == columns[None, :]) & (columns[None, :] < experts)
    tl.store(counts + block * E2 + columns, tl.sum(mine.to(tl.int32), axis=0))


@triton.jit
def _sum_up_kernel(counts, totals, num_blocks: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counts of one expert become the number of its pairs in earlier blocks."""
    expert = tl.program_id(0)
    total = 0
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        count = tl.load(counts + block * E2 + expert, mask=block < num_blocks, other=0)
        tl.store(counts + block * E2 + expert, total + tl.cumsum(count, axis=0) - count, mask=block < num_blocks)
        total += tl.sum(count, axis=0)
    tl.store(totals + expert, total)


@triton.jit
def _place_kernel(
    index, counts, totals, slot_of, row_of, ends, most, num_pairs, first, room, experts: tl.constexpr,
    E2: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + pair, mask=pair < num_pairs, other=-1).to(tl.int32) - first
    columns = tl.arange(0, E2)
    mine = ((expert[:, None] == columns[None, :]) & (columns[None, :] < experts)).to(tl.int32)
    total = tl.load(totals + columns)
    end = tl.cumsum(total, axis=0)
    before = end - total + tl.load(counts + block * E2 + columns)  # where this block's first pair of an expert goes
    place = tl.sum(mine * (before[None, :] + tl.cumsum(mine, axis=0) - mine), axis=1)
    kept = (expert >= 0) & (expert < experts) & (place < room)
    tl.store(row_of + pair, tl.where(kept, place, -1).to(tl.int64), mask=pair < num_pairs)
    tl.store(slot_of + place, pair.to(tl.int64), mask=kept)
    num_rows = tl.sum(total, axis=0)
    # Rows that are not there stand for a slot behind the last.
    tl.store(slot_of + pair, (pair * 0 + num_pairs).to(tl.int64), mask=(pair >= num_rows) & (pair < room))
    if block == 0:
        tl.store(ends + columns, tl.minimum(end, room), mask=columns < experts)
        tl.store(most, tl.maximum(tl.load(most), num_rows))


def expert_order_reference(
    index_GK: Tensor, most_rows: Tensor, *, first: int, num_experts: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``expert_order``, by torch's sort."""
    local = index_GK.flatten().long() - first
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    sorted_M, order_M = local.sort(stable=True)
    experts = torch.arange(num_experts, device=local.device)
    ends_e = torch.searchsorted(sorted_M, experts, right=True)
    num_pairs, num_rows = len(local), ends_e[-1]
    most_rows.copy_(torch.maximum(most_rows, num_rows.to(most_rows.dtype)))
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(num_pairs, device=local.device)
    row_M = torch.where((local < num_experts) & (row_M < room), row_M, -1)
    place = torch.arange(room, device=local.device)
    slot_N = torch.where(place < num_rows, order_M[:room], num_pairs)
    return slot_N, row_M.view_as(index_GK), ends_e.clamp(max=room).to(torch.int32)


def expert_order(
    index_GK: Tensor, most_rows: Tensor, *, first: int, num_experts: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (g, k) whose expert is one of ``first ... first + num_experts - 1``, in order of expert, g and k.

    Args:
        index_GK: integer expert ids; any other id is left out.
        most_rows: int32 ``[1]``; becomes the number of pairs found, if that is more. Above ``room`` the last ones are
            not in the order: what is computed from it is wrong, and the caller has to throw it away.
        room: rows to order, at most G * K.
    Returns:
        slot_N: int64 ``[room]``, which slot ``g * K + k`` row n is; G * K for rows that are not there.
        row_GK: int64, the row of each slot, -1 for none.
        ends_e: int32, one past the last row of each expert.
    """
    if not use_triton(index_GK):
        return expert_order_reference(index_GK, most_rows, first=first, num_experts=num_experts, room=room)
    num_pairs, columns, device = index_GK.numel(), power_of_two(num_experts), index_GK.device
    num_blocks = -(-num_pairs // PAIRS_A_BLOCK)
    counts = torch.empty(num_blocks + 1, columns, dtype=torch.int32, device=device)
    totals = counts[num_blocks]
    slot_N = torch.empty(room, dtype=torch.int64, device=device)
    row_GK = torch.empty(index_GK.shape, dtype=torch.int64, device=device)
    ends_e = torch.empty(num_experts, dtype=torch.int32, device=device)
    shape = {"experts": num_experts, "E2": columns, "BLOCK": PAIRS_A_BLOCK}
    _count_kernel[(num_blocks,)](index_GK, counts, num_pairs, first, **shape)
    _sum_up_kernel[(columns,)](counts, totals, num_blocks, E2=columns, BLOCK=min(1024, power_of_two(num_blocks)))
    _place_kernel[(num_blocks,)](
        index_GK, counts, totals, slot_N, row_GK, ends_e, most_rows, num_pairs, first, room, **shape
    )
    return slot_N, row_GK, ends_e
