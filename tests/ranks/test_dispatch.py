"""The dispatch plan against gathering everything, and what travels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_recipes.moe.all_to_all import DispatchPlan, make_plan
from moe_recipes.moe.reference import dispatch_reference
from tests.ranks.launch import run_on_ranks

EXPERTS, WIDTH, TOP_K = 8, 3, 3


def routing(kind: str, rank: int, num_tokens: int) -> torch.Tensor:
    """int64 [T, K], different experts for each token."""
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    if kind == "skewed":  # the first rank's experts for all but a few tokens
        scores[: max(0, num_tokens - 2), :TOP_K] += 1
    return scores.topk(TOP_K).indices


def exchange(rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """The plan's rows as plain collectives move them."""
    out = rows.new_empty(sum(plan.recv_counts), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), plan.recv_counts, plan.send_counts)
    return out


def check_plan(kind: str, tokens: list[int]) -> None:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    local = EXPERTS // ranks
    index = routing(kind, rank, tokens[rank])
    x = torch.arange(tokens[rank] * WIDTH).view(-1, WIDTH).float() + 1000 * rank
    plan = make_plan(index, num_local_experts=local, group=group)

    pairs = {(token, int(expert) // local) for token, row in enumerate(index) for expert in row}
    assert sum(plan.send_counts) == len(plan.sent.slot_N) == len(pairs)
    token_of, rank_of = plan.sent.token_N.tolist(), (plan.sent.slot_N % ranks).tolist()
    assert sorted(zip(token_of, rank_of, strict=True)) == sorted(pairs)
    assert rank_of == sorted(rank_of)

    received = exchange(x[plan.sent.token_N], plan)
    assert plan.num_routed_rows == int((plan.expert_RK < local).sum())
    for expert, rows in enumerate(dispatch_reference(x, index, num_local_experts=local, group=group)):
        mine = received[(plan.expert_RK == expert).any(dim=1)]
        assert torch.equal(mine, rows)
    slots = exchange(torch.arange(tokens[rank])[plan.sent.token_N][:, None] + 1000 * rank, plan)
    for row, origin in enumerate(slots.flatten().tolist()):
        there = routing(kind, origin // 1000, tokens[origin // 1000])[origin % 1000]
        here = torch.where(there // local == rank, there % local, local)
        assert torch.equal(plan.expert_RK[row], here)  # slot by slot: the routing weights travel beside it


@pytest.mark.parametrize("kind", ["random", "skewed"])
@pytest.mark.parametrize("tokens", [[17, 17], [0, 9], [11, 11, 11, 11], [5, 0, 1, 30]])
def test_plan_against_gathering_everything(kind, tokens):
    run_on_ranks(check_plan, len(tokens), kind, tokens)
