"""The fused expert block: its one-pass backward against autograd in float64, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from moe_recipes.kernels.rows import RowMap, make_row_map
from moe_recipes.kernels.swiglu import weighted_swiglu_backward
from moe_recipes.moe.gated_experts import gated_experts

TOKENS, SLOTS, WIDTH, HIDDEN, EXPERTS = 11, 3, 24, 16, 4


def routed(*, empty_expert: bool) -> tuple[torch.Tensor, RowMap, torch.Tensor]:
    """Random choices of distinct experts, rows in expert order; slots of the last token are elsewhere."""
    scores = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    if empty_expert:
        scores[:, 2] = -torch.inf
    index = scores.topk(SLOTS).indices
    index[-1] = EXPERTS
    ordered, order = index.flatten().sort(stable=True)
    here = int((ordered < EXPERTS).sum())
    rows = make_row_map(order[:here], num_tokens=TOKENS, num_slots=SLOTS)
    ends = torch.searchsorted(ordered, torch.arange(EXPERTS), right=True, out_int32=True)
    return index, rows, ends


def test_one_pass_backward_of_the_activation_is_autograds():
    torch.manual_seed(0)
    slot = torch.randperm(TOKENS * SLOTS)[:20]
    grad, gate_up = torch.randn(20, WIDTH).double(), torch.randn(20, 2 * WIDTH).double().requires_grad_()
    weight = torch.rand(TOKENS, SLOTS).double().requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    weighted = weight.reshape(-1)[slot].unsqueeze(1) * F.silu(gate) * up
    weighted.backward(grad)
    act, grad_gate_up, grad_weight = weighted_swiglu_backward(grad, gate_up.detach(), weight.detach(), slot)
    torch.testing.assert_close(act, weighted.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_gate_up, gate_up.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_weight, weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("empty_expert", [False, True])
def test_every_gradient_against_a_loop_over_experts(transposed, empty_expert):
    torch.manual_seed(1)
    index, rows, ends = routed(empty_expert=empty_expert)
    shapes = {
        "x": (TOKENS, HIDDEN),
        "weight": (TOKENS, SLOTS),
        "gate_up": (EXPERTS, 2 * WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }
    values = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    upstream = torch.randn(TOKENS, HIDDEN)

    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for expert in range(EXPERTS):
        gate, up = (exact["x"] @ exact["gate_up"][expert].T).chunk(2, dim=-1)
        scale = (exact["weight"] * (index == expert)).sum(dim=1, keepdim=True)
        expected = expected + scale * ((F.silu(gate) * up) @ exact["down"][expert].T)
    expected.backward(upstream.double())

    gate_up, down = values["gate_up"], values["down"]
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    out = gated_experts(values["x"], values["weight"], gate_up, down, rows=rows, ends_e=ends, transposed=transposed)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-4)
    out.backward(upstream)
    for name, value in values.items():
        assert value.grad is not None
        torch.testing.assert_close(value.grad, exact[name].grad.float(), rtol=1e-5, atol=2e-4)
    if empty_expert:
        assert values["down"].grad[2].abs().max() == 0


def test_no_row_at_all_gives_zeros_and_zero_gradients():
    rows = make_row_map(torch.empty(0, dtype=torch.int64), num_tokens=TOKENS, num_slots=SLOTS)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.rand(TOKENS, SLOTS, requires_grad=True)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, requires_grad=True)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, requires_grad=True)
    ends = torch.zeros(EXPERTS, dtype=torch.int32)
    out = gated_experts(x, weight, gate_up, down, rows=rows, ends_e=ends, transposed=False)
    out.sum().backward()
    assert out.abs().max() == 0
    assert all(value.grad is not None and value.grad.abs().max() == 0 for value in (x, weight, gate_up, down))


def test_it_keeps_the_rows_and_the_first_product_only():
    torch.manual_seed(2)
    _, rows, ends = routed(empty_expert=False)
    x, weight = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.rand(TOKENS, SLOTS, requires_grad=True)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, requires_grad=True)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, requires_grad=True)
    kept: list[torch.Size] = []
    with saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gated_experts(x, weight, gate_up, down, rows=rows, ends_e=ends, transposed=False)
    activations = [shape for shape in kept if shape not in (gate_up.shape, down.shape)]
    assert sorted(activations) == sorted([x.shape, weight.shape, torch.Size([len(rows.slot_N), 2 * WIDTH])])
