"""Row gathers and weighted sums against plain indexing."""

from __future__ import annotations

import pytest
import torch

from moe_recipes.kernels.rows import RowMap, make_row_map, sum_rows, take_rows

TOKENS, SLOTS, WIDTH = 6, 3, 5


def some_rows(*, share: float = 0.6, seed: int = 0) -> RowMap:
    """A random part of the T x J slots, in random order."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(TOKENS * SLOTS, generator=generator)[: int(share * TOKENS * SLOTS)]
    return make_row_map(slots, num_tokens=TOKENS, num_slots=SLOTS)


def dense_take(x: torch.Tensor, rows: RowMap) -> torch.Tensor:
    return torch.stack([x[slot // SLOTS] for slot in rows.slot_N.tolist()]) if len(rows.slot_N) else x[:0]


def dense_sum(y: torch.Tensor, rows: RowMap, weight: torch.Tensor) -> torch.Tensor:
    tokens = [torch.zeros(WIDTH, dtype=y.dtype) for _ in range(TOKENS)]
    for n, slot in enumerate(rows.slot_N.tolist()):
        tokens[slot // SLOTS] = tokens[slot // SLOTS] + y[n] * weight[slot // SLOTS, slot % SLOTS]
    return torch.stack(tokens)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_take_and_sum_against_a_loop(share):
    rows = some_rows(share=share)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(rows.slot_N), WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(TOKENS, SLOTS, dtype=torch.float64, requires_grad=True)
    grad_n, grad_t = torch.randn(len(rows.slot_N), WIDTH).double(), torch.randn(TOKENS, WIDTH).double()
    torch.testing.assert_close(take_rows(x, rows), dense_take(x, rows))
    torch.testing.assert_close(sum_rows(y, rows, weight_TJ=weight), dense_sum(y, rows, weight))
    torch.testing.assert_close(sum_rows(y, rows), dense_sum(y, rows, torch.ones_like(weight)))
    if share:
        got = torch.autograd.grad(take_rows(x, rows), x, grad_n)
        torch.testing.assert_close(got, torch.autograd.grad(dense_take(x, rows), x, grad_n))
        got = torch.autograd.grad(sum_rows(y, rows, weight_TJ=weight), (y, weight), grad_t)
        torch.testing.assert_close(got, torch.autograd.grad(dense_sum(y, rows, weight), (y, weight), grad_t))


def test_gradcheck():
    rows = some_rows()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(rows.slot_N), WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(TOKENS, SLOTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows), x)
    assert torch.autograd.gradcheck(lambda y: sum_rows(y, rows), y)
    assert torch.autograd.gradcheck(lambda y, w: sum_rows(y, rows, weight_TJ=w), (y, weight))


def test_bfloat16_sums_are_rounded_once():
    """Adding 1 and many halves of its last bit in bfloat16 would stay at 1."""
    tiny = 2.0**-9
    rows = make_row_map(torch.arange(SLOTS), num_tokens=1, num_slots=SLOTS)
    y = torch.tensor([[1.0], [tiny * 2], [tiny * 2]], dtype=torch.bfloat16)
    assert float(sum_rows(y, rows)) == 1 + 2.0**-7


def test_row_map_is_its_own_inverse():
    rows = some_rows()
    for n, slot in enumerate(rows.slot_N.tolist()):
        assert int(rows.row_TJ[slot // SLOTS, slot % SLOTS]) == n
        assert int(rows.token_N[n]) == slot // SLOTS
    assert int((rows.row_TJ >= 0).sum()) == len(rows.slot_N)
