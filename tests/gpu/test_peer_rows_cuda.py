"""Kernels that write into other ranks' memory against their references, on one GPU: the ranks are pieces of its memory.

Without a GPU, ``TRITON_INTERPRET=1`` and Triton run these kernels in tests/unit/test_peer_rows.py.
"""

from __future__ import annotations

import pytest
import torch

from moe_recipes.kernels.expert_order import expert_order
from moe_recipes.kernels.peer_rows import Region, collect_rows, combine_rows, push_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
RANKS, TOP_K = 2, 6


def region(rows: int, columns: int, dtype: torch.dtype, device: str) -> Region:
    views = [torch.zeros(rows, columns, dtype=dtype, device=device) for _ in range(RANKS)]
    return Region(views=views, pointers_P=torch.tensor([view.data_ptr() for view in views], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "experts"), [(5, 7, 3), (333, 1500, 40), (1024, 2048, 64)])
def test_a_round_trip_equals_the_reference(tokens, width, experts, dtype):
    """Push, order, combine with weights, collect: both directions, with a rank that has fewer tokens."""
    generator = torch.Generator().manual_seed(0)
    counts = [tokens, tokens // 2]
    index = [torch.rand(n, experts * RANKS, generator=generator).topk(TOP_K).indices for n in counts]
    weight = [torch.rand(n, TOP_K, generator=generator).to(dtype) for n in counts]
    x = [torch.randn(n, width, generator=generator).to(dtype) for n in counts]
    found = {device: round_trip(x, index, weight, tokens, experts, device) for device in ("cpu", "cuda")}
    for name, wanted in found["cpu"].items():
        got = found["cuda"][name].cpu()
        tolerance = 0 if not wanted.is_floating_point() else 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def round_trip(
    x: list[torch.Tensor], index: list[torch.Tensor], weight: list[torch.Tensor], room: int, experts: int, device: str
) -> dict[str, torch.Tensor]:
    width, dtype, places = x[0].shape[1], x[0].dtype, room * RANKS
    rows, other, back = (region(places, width, dtype, device) for _ in range(3))
    weights, grads = (region(places, TOP_K, dtype, device) for _ in range(2))
    choices = region(places, TOP_K, torch.int32, device)
    x, index, weight = ([tensor.to(device) for tensor in tensors] for tensors in (x, index, weight))
    found = {}
    for me in range(RANKS):
        travelling = [(x[me], rows), (-x[me], other)]
        push_rows(travelling, index[me], weight[me], weights, choices, me=me, num_local_experts=experts)
    for me in range(RANKS):
        most = torch.zeros(1, dtype=torch.int32, device=device)
        many = places * TOP_K * 3 // 4
        slot, row, ends = expert_order(choices.views[me], most, first=me * experts, num_experts=experts, room=many)
        there = slot < places * TOP_K
        y = rows.views[me][(slot // TOP_K).clamp(max=places - 1)] - 2 * other.views[me][slot.clamp(max=0)]
        y[~there] = float("nan")
        gradient = torch.where(row >= 0, weights.views[me] * 3, 0)
        combine_rows(
            y, row, back, me=me, weight_GK=weights.views[me], grad_weight_GK=gradient, grad_to=grads
        )  # fmt: skip
        found |= {f"slot {me}": slot, f"row {me}": row, f"ends {me}": ends, f"most {me}": most}
        found |= {f"rows {me}": rows.views[me], f"other {me}": other.views[me]}
    for me in range(RANKS):
        out, grad = collect_rows(
            back.views[me], index[me], num_ranks=RANKS, num_local_experts=experts, grad_GK=grads.views[me]
        )
        assert grad is not None
        found |= {f"out {me}": out, f"grad {me}": grad}
    return found
