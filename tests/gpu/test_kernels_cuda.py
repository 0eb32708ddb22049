"""Triton kernels against their torch references, on the GPU. ``make test-gpu`` runs them."""

from __future__ import annotations

import pytest
import torch

from moe_recipes.kernels import rows as row_kernels
from moe_recipes.kernels.lean_adamw import Plan, Step, step_reference
from moe_recipes.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    softmax_loss,
    softmax_loss_reference,
)
from moe_recipes.kernels.rms_norm import rms_norm, rms_norm_reference
from moe_recipes.kernels.swiglu import swiglu, swiglu_reference
from moe_recipes.moe.gated_experts import gated_experts
from tests.unit.lean_parts import KINDS, copied, differing, new_part

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPES = [(7, 3, 48), (33, 8, 1500), (4096, 8, 2048)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def tolerance(dtype: torch.dtype) -> float:
    """One rounding of the result, against a float64 reference."""
    return 1e-6 if dtype == torch.float32 else 4e-3


def some_rows(tokens: int, slots: int) -> row_kernels.RowMap:
    """About 70 % of the slots, in random order."""
    slot = torch.nonzero(torch.rand(tokens * slots, device="cuda") < 0.7).flatten()
    slot = slot[torch.randperm(len(slot), device="cuda")]
    return row_kernels.make_row_map(slot, num_tokens=tokens, num_slots=slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "slots", "columns"), SHAPES)
def test_rows_equal_reference(tokens, slots, columns, dtype):
    rows = some_rows(tokens, slots)
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.rand(tokens, slots, device="cuda", dtype=dtype, requires_grad=True)
    out = row_kernels.sum_rows(row_kernels.take_rows(x, rows) * 2, rows, weight_TJ=weight)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weight), grad)

    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    y64 = x64[rows.token_N] * 2
    flat = (y64 * weight64.reshape(-1)[rows.slot_N, None]).to(torch.float64)
    expected = torch.zeros(tokens, columns, device="cuda", dtype=torch.float64).index_add(0, rows.token_N, flat)
    wanted = torch.autograd.grad(expected, (x64, weight64), grad.double())
    assert relative(out, expected) < tolerance(dtype)
    assert relative(got[0], wanted[0]) < 2 * tolerance(dtype)
    assert relative(got[1], wanted[1]) < 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 768, 1536])
def test_swiglu_equals_reference(width, dtype):
    gate_up = torch.randn(1000, 2 * width, device="cuda", dtype=dtype, requires_grad=True)
    out = swiglu(gate_up)
    grad = torch.randn_like(out)
    wide = gate_up.detach().double().requires_grad_()
    expected = swiglu_reference(wide)
    assert relative(out, expected) < tolerance(dtype)
    got, wanted = torch.autograd.grad(out, gate_up, grad), torch.autograd.grad(expected, wide, grad.double())
    assert relative(got[0], wanted[0]) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [1000, 151936])
def test_softmax_loss_equals_reference(words, dtype):
    logits = torch.randn(64, words, device="cuda", dtype=dtype) * 4
    labels = torch.randint(0, words, (64,), device="cuda")
    labels[::5] = -100
    expected_loss, expected_grad = softmax_loss_reference(logits.double(), labels)
    loss, grad = softmax_loss(logits.clone(), labels)
    assert relative(loss, expected_loss) < 1e-5
    assert relative(grad, expected_grad) < tolerance(dtype)
    assert torch.equal(loss[::5], torch.zeros_like(loss[::5]))
    assert torch.equal(grad[::5], torch.zeros_like(grad[::5]))


def test_linear_cross_entropy_equals_reference():
    hidden = torch.randn(1000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(5000, 256, device="cuda") / 8).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 5000, (1000,), device="cuda")
    labels[:300] = -100
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=300)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = linear_cross_entropy_reference(*wide, labels)
    assert relative(loss, expected) < 1e-3
    got, wanted = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, wide)
    assert relative(got[0], wanted[0]) < 1e-2
    assert relative(got[1], wanted[1]) < 1e-2


def test_sums_are_repeatable_bit_for_bit():
    rows = some_rows(2000, 8)
    y = torch.randn(len(rows.slot_N), 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(2000, 8, device="cuda", dtype=torch.bfloat16)
    first = row_kernels.sum_rows(y, rows, weight_TJ=weight)
    for _ in range(5):
        assert torch.equal(first, row_kernels.sum_rows(y, rows, weight_TJ=weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 48), (4096, 32, 128), (4096, 2048), (3, 8192)])
def test_rms_norm_equals_reference(shape, dtype):
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    weight = (1 + torch.randn(shape[-1], device="cuda") / 10).to(dtype).requires_grad_()
    out = rms_norm(x, weight, 1e-6)
    grad = torch.randn_like(out)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm_reference(*wide, 1e-6)
    got, wanted = torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, wide, grad.double())
    # Normalised values are rounded before the weight, as in Transformers: two roundings.
    assert relative(out, expected) < 2 * tolerance(dtype)
    assert relative(got[0], wanted[0]) < 2 * tolerance(dtype)
    assert relative(got[1], wanted[1]) < 2 * tolerance(dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_gated_experts_equal_float64_and_leave_empty_experts_alone(transposed):
    tokens, slots, num_experts, width, hidden = 512, 4, 8, 96, 128
    torch.manual_seed(0)
    scores = torch.randn(tokens, num_experts, device="cuda")
    scores[:, [0, 3, 7]] = -torch.inf  # first, middle and last expert without a row
    index = scores.topk(slots).indices
    ordered, order = index.flatten().sort(stable=True)
    rows = row_kernels.make_row_map(order, num_tokens=tokens, num_slots=slots)
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device="cuda"), right=True, out_int32=True)
    shapes = [(tokens, hidden), (tokens, slots), (num_experts, 2 * width, hidden), (num_experts, hidden, width)]
    exact = [torch.randn(shape, device="cuda").bfloat16().double().requires_grad_() for shape in shapes]
    upstream = torch.randn(tokens, hidden, device="cuda").bfloat16()
    x, weight, gate_up, down = exact
    expected = torch.zeros(tokens, hidden, device="cuda", dtype=torch.float64)
    for expert in range(num_experts):
        gate, up = (x @ gate_up[expert].T).chunk(2, dim=-1)
        scale = (weight * (index == expert)).sum(dim=1, keepdim=True)
        expected = expected + scale * ((torch.nn.functional.silu(gate) * up) @ down[expert].T)
    expected.backward(upstream.double())

    values = [value.detach().bfloat16() for value in exact]
    if transposed:
        values[2:] = [value.transpose(1, 2).contiguous() for value in values[2:]]
    values = [value.requires_grad_() for value in values]
    # Memory that kernels leave as they found it holds NaN, so that a gradient that nobody wrote shows.
    torch.full((64 << 20,), float("nan"), device="cuda")
    out = gated_experts(*values, rows=rows, ends_e=ends, transposed=transposed)
    out.backward(upstream)
    assert relative(out, expected) < 1e-2
    for value, reference in zip(values, exact, strict=True):
        assert value.grad is not None
        assert reference.grad is not None
        got = value.grad.transpose(1, 2) if transposed and value.ndim == 3 else value.grad
        assert relative(got, reference.grad) < 1.5e-2
    for value in values[2:]:
        assert value.grad is not None
        assert value.grad[[0, 3, 7]].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_lean_adamw_has_the_bits_of_the_cpu(kind):
    torch.manual_seed(0)
    sizes = [5, 1000, 40_001] if kind != "codes" else [128, 128 * 300, 2048 * 768]
    here = [new_part(size, kind=kind, offset=size << 20, seed=size) for size in sizes]
    there = [copied(part, "cuda") for part in here]
    plan = Plan(there)
    for number in range(1, 6):
        step = Step(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, number=number, grad_factor=0.37)
        dtype = torch.float32 if kind == "float32 weights" else torch.bfloat16
        grads = [(torch.randn(size) * 10.0 ** (-3 * number)).to(dtype) for size in sizes]
        step_reference(here, grads, step)
        plan.launch([grad.cuda() for grad in grads], step)
    assert [differing(a, b) for a, b in zip(here, there, strict=True)] == [[], [], []]
