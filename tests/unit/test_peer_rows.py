"""Rows stored into other ranks' memory, against gathering everything; ranks here are pieces of one tensor.

With TRITON_INTERPRET=1, and triton installed, the same tests run the kernels instead of their references.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_recipes.kernels.expert_order import expert_order, expert_order_reference
from moe_recipes.kernels.peer_rows import Region, collect_rows, combine_rows, push_rows
from moe_recipes.kernels.rows import sum_rows_reference
from moe_recipes.kernels.triton import INTERPRETED

TOP_K, EXPERTS = 3, 4
"""Experts are those of one rank."""


def region(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> Region:
    views = [torch.full((rows, columns), 7, dtype=dtype) for _ in range(ranks)]
    return Region(views=views, pointers_P=torch.tensor([view.data_ptr() for view in views]))


def choices(tokens: list[int], *, seed: int = 0) -> list[torch.Tensor]:
    """Distinct experts of each token of each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, EXPERTS * len(tokens), generator=generator).topk(TOP_K).indices for n in tokens]


@pytest.mark.parametrize("tokens", [[5, 5], [6, 0], [3, 6, 1, 6]])
@pytest.mark.parametrize("width", [5, 1500])
@pytest.mark.parametrize("tensors", [1, 2])
def test_a_row_is_on_every_rank_that_needs_it_and_nowhere_else(tokens, width, tensors):
    ranks, room = len(tokens), max(tokens)
    to = [region(ranks, ranks * room, width, torch.float32) for _ in range(tensors)]
    weight_to = region(ranks, ranks * room, TOP_K, torch.float32)
    index, rows = choices(tokens), [[torch.randn(n, width) for n in tokens] for _ in range(tensors)]
    for me in range(ranks):
        travelling = [(rows[i][me], to[i]) for i in range(tensors)]
        push_rows(travelling, index[me], torch.rand(tokens[me], TOP_K), weight_to, me=me, num_local_experts=EXPERTS)
    for i, p, me in itertools.product(range(tensors), range(ranks), range(ranks)):
        for t in range(room):
            goes = t < tokens[me] and bool((index[me][t] // EXPERTS == p).any())
            wanted = rows[i][me][t] if goes else torch.full((width,), 7.0)
            assert torch.equal(to[i].views[p][me * room + t], wanted), (i, p, me, t)


def test_choices_reach_all_and_leave_none_of_an_earlier_call():
    tokens, room = [2, 5], 5
    to, weight_to = region(2, 10, 3, torch.float32), region(2, 10, TOP_K, torch.bfloat16)
    index_to = region(2, 10, TOP_K, torch.int32)
    index, weight = choices(tokens), [torch.rand(n, TOP_K).bfloat16() for n in tokens]
    for me in range(2):
        rows = [(torch.rand(tokens[me], 3), to)]
        push_rows(rows, index[me], weight[me], weight_to, index_to, me=me, num_local_experts=EXPERTS)
    for p, me in itertools.product(range(2), range(2)):
        block = slice(me * room, me * room + tokens[me])
        assert torch.equal(index_to.views[p][block], index[me].int())
        assert torch.equal(weight_to.views[p][block], weight[me])
        assert (index_to.views[p][2:5] == -1).all()
        assert (weight_to.views[p][2:5] == 0).all()
    index_to.views[1][:] = 9
    push_rows([(torch.rand(2, 3), to)], index[0], weight[0] * 2, weight_to, me=0, num_local_experts=EXPERTS)
    assert (index_to.views[1] == 9).all()
    assert torch.equal(weight_to.views[1][:2], weight[0] * 2)


@pytest.mark.parametrize("tokens", [[5, 5], [6, 0], [3, 6, 1, 6]])
@pytest.mark.parametrize("width", [5, 1500])
def test_sums_come_back_to_the_token(tokens, width):
    """Every rank's part of a weighted sum over all slots, and the gradient of each weight from the expert's rank."""
    ranks, room = len(tokens), max(tokens)
    to, grad_to = region(ranks, ranks * room, width, torch.float32), region(ranks, ranks * room, TOP_K, torch.float32)
    index = choices(tokens)
    whole = torch.full((ranks * room, TOP_K), -1)
    for me, mine in enumerate(index):
        whole[me * room : me * room + len(mine)] = mine
    weight, values = torch.rand(ranks * room, TOP_K), torch.randn(ranks * room, TOP_K, width)
    grads = torch.randn(ranks * room, TOP_K)
    for me in range(ranks):
        slot = torch.nonzero((whole.flatten() >= me * EXPERTS) & (whole.flatten() < (me + 1) * EXPERTS)).flatten()
        slot = slot[torch.randperm(len(slot))]
        row = torch.full((ranks * room * TOP_K,), -1)
        row[slot] = torch.arange(len(slot))
        y = torch.cat([values.view(-1, width)[slot], torch.full((3, width), torch.nan)])  # rows that are not there
        combine_rows(
            y, row.view(-1, TOP_K), to, me=me, weight_GK=weight, grad_weight_GK=torch.where(row >= 0, grads.flatten(),
            torch.nan).view(-1, TOP_K), grad_to=grad_to,
        )  # fmt: skip
    for me, mine in enumerate(index):
        out, grad = collect_rows(
            to.views[me], mine, num_ranks=ranks, num_local_experts=EXPERTS, grad_GK=grad_to.views[me]
        )
        block = slice(me * room, me * room + len(mine))
        torch.testing.assert_close(out, (weight[block, :, None] * values[block]).sum(dim=1))
        assert grad is not None
        assert torch.equal(grad, grads[block])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts bfloat16 off")
def test_bfloat16_sums_are_rounded_once_a_rank():
    """Both ways: what is added up in bfloat16 would stay at 1."""
    tiny = 3 * 2.0**-10
    y = torch.tensor([[1.0], [tiny], [tiny]]).bfloat16()
    to = region(2, 2, 1, torch.bfloat16)
    combine_rows(y, torch.tensor([[0, 1, 2], [-1, -1, -1]]), to, me=0)
    assert float(to.views[0][0, 0]) == float(torch.tensor(1 + 2 * tiny).bfloat16()) != 1.0
    assert float(to.views[0][1, 0]) == float(to.views[1][0, 0]) == 7.0
    wanted = sum_rows_reference(y, torch.tensor([[0, 1, 2]]), None)
    assert torch.equal(to.views[0][:1], wanted)


@pytest.mark.parametrize(("places", "experts", "first"), [(1, 1, 0), (70, 4, 4), (300, 6, 12), (257, 64, 64)])
@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_order_is_a_stable_sort(places, experts, first, share):
    index = torch.randint(-1, 24 if experts < 64 else 192, (places, TOP_K), dtype=torch.int32)
    pairs = [(int(e), i) for i, e in enumerate(index.flatten()) if first <= e < first + experts]
    order = [i for _, i in sorted(pairs)]
    room = max(1, min(places * TOP_K, int(share * len(order))))
    most = torch.zeros(1, dtype=torch.int32)
    slot, row, ends = expert_order(index, most, first=first, num_experts=experts, room=room)
    assert int(most) == len(order)
    kept = order[:room]
    assert slot.tolist() == kept + [places * TOP_K] * (room - len(kept))
    wanted = torch.full((places * TOP_K,), -1)
    wanted[torch.tensor(kept, dtype=torch.int64)] = torch.arange(len(kept))
    assert torch.equal(row.flatten(), wanted)
    counts = [min(room, sum(e <= first + x for e, _ in pairs)) for x in range(experts)]
    assert ends.dtype == torch.int32
    assert ends.tolist() == counts
    again = expert_order_reference(index, most, first=first, num_experts=experts, room=room)
    for mine, theirs in zip((slot, row, ends), again, strict=True):
        assert torch.equal(mine, theirs)


def test_most_rows_keeps_the_largest():
    most = torch.tensor([5], dtype=torch.int32)
    expert_order(torch.zeros(2, 1, dtype=torch.int32), most, first=0, num_experts=1, room=2)
    assert int(most) == 5
    expert_order(torch.zeros(9, 1, dtype=torch.int32), most, first=0, num_experts=1, room=2)
    assert int(most) == 9
