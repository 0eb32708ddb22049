"""Kernels around attention against float64, forward and backward, on the GPU.

Without one, ``TRITON_INTERPRET=1`` and Triton run the same tests in its interpreter, which cuts bfloat16 off where a
GPU rounds: only float32 says something there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from moe_recipes import AutoModelForCausalLM
from moe_recipes.kernels import qk_norm_rope as qk_norm_rope_module
from moe_recipes.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from moe_recipes.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from moe_recipes.kernels.rms_norm import rms_norm, rms_norm_reference
from moe_recipes.kernels.triton import HAVE_TRITON, INTERPRETED
from moe_recipes.models.auto import enable_activation_checkpointing
from tests.tiny_models import tiny_config

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not (HAVE_TRITON and INTERPRETED), reason="needs a CUDA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]

# batch, length, query heads, key heads, head dim, rotary dims
HEADS = [
    (2, 5, 4, 2, 16, 16),
    (1, 7, 6, 1, 24, 12),
    (2, 3, 33, 3, 128, 128),
    (1, 3, 5, 2, 10, 6),
]
if CUDA:
    HEADS += [
        (1, 1300, 2, 1, 16, 16),
        (1, 4096, 32, 4, 128, 128),
        (2, 2048, 32, 2, 128, 64),
        (1, 1024, 64, 8, 256, 256),
    ]


def tolerance(dtype: torch.dtype) -> float:
    """One rounding, against float64."""
    return 1e-6 if dtype == torch.float32 else 4e-3


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def close(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], limit: float) -> None:
    for mine, exact in zip(got, wanted, strict=True):
        assert mine.shape == exact.shape
        assert relative(mine, exact) < limit


def heads_case(shape: tuple[int, ...], dtype: torch.dtype, *, norm: bool = True) -> tuple[list, list, Callable]:
    """Inputs, output gradients and the call of a function on slices of one fused projection."""
    torch.manual_seed(0)
    batch, length, q_heads, k_heads, dim, rotary = shape
    sizes = (q_heads * dim, k_heads * dim, k_heads * dim)
    tensors = [torch.randn(batch, length, sum(sizes), device=DEVICE)]
    tensors += [1 + torch.randn(dim, device=DEVICE) / 5 for _ in range(2 * norm)]
    inputs = [t.to(dtype).requires_grad_() for t in tensors]
    angle = torch.randint(0, 5000, (batch, length, 1), device=DEVICE) * torch.rand(rotary, device=DEVICE)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    # As attention hands them back: [B, H, S, D] seen as [B, S, H, D].
    grads = [
        torch.randn(batch, heads, length, dim, device=DEVICE).to(dtype).transpose(1, 2) for heads in (q_heads, k_heads)
    ]

    def run(function: Callable, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, _ = inputs[0].split(sizes, dim=-1)
        weights = {"q_weight_D": inputs[1], "k_weight_D": inputs[2]} if norm else {}
        return function(q, k, cos.to(q.dtype), sin.to(q.dtype), head_dim=dim, eps=1e-6, **weights)

    return inputs, grads, run


def check_heads(shape: tuple[int, ...], dtype: torch.dtype, *, norm: bool = True) -> None:
    inputs, grads, run = heads_case(shape, dtype, norm=norm)
    out, inputs64 = run(qk_norm_rope, inputs), wide(inputs)
    assert "QKNormRope" in str(out[0].grad_fn)
    assert all(x.is_contiguous() for x in out)
    expected = run(qk_norm_rope_reference, inputs64)
    # Rounded after the norm, the weight, both products and the sum, as in Transformers.
    close(out, expected, 2 * tolerance(dtype))
    got = torch.autograd.grad(out, inputs, grads)
    close(got, torch.autograd.grad(expected, inputs64, [g.double() for g in grads]), 2 * tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", HEADS)
def test_qk_norm_rope_equals_reference(shape, norm, dtype):
    check_heads(shape, dtype, norm=norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradients_of_several_tokens_a_program(dtype, monkeypatch):
    monkeypatch.setattr(qk_norm_rope_module, "MAX_PROGRAMS", 3)
    check_heads((1, 7, 6, 1, 24, 12), dtype)  # the last program has one token of its four left
    check_heads((2, 9, 3, 2, 16, 16), dtype)


def test_qk_norm_rope_is_no_further_from_float64_than_transformers():
    """In bfloat16: on a GPU the kernel rounds its result once, eager Transformers after every operation."""
    if not CUDA:
        pytest.skip("the interpreter cuts bfloat16 off")
    inputs, _, run = heads_case((1, 512, 8, 2, 128, 128), torch.bfloat16)
    mine, eager = run(qk_norm_rope, inputs), run(qk_norm_rope_reference, inputs)
    exact = run(qk_norm_rope_reference, wide(inputs))
    for fused, theirs, wanted in zip(mine, eager, exact, strict=True):
        assert relative(fused, wanted) <= 1.01 * relative(theirs, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (37, 1500), (1, 2048), (3, 7), *([(4096, 2048)] if CUDA else [])])
def test_add_rms_norm_equals_reference(shape, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)]
    tensors.append(1 + torch.randn(shape[-1], device=DEVICE) / 5)
    inputs = [t.to(dtype).requires_grad_() for t in tensors]
    out, inputs64 = add_rms_norm(*inputs, 1e-6), wide(inputs)
    assert torch.equal(out[1], inputs[1] + inputs[0])
    expected = add_rms_norm_reference(*inputs64, 1e-6)
    close(out, expected, 2 * tolerance(dtype))
    grads = [torch.randn(shape, device=DEVICE).to(dtype) for _ in out]
    grads64 = [g.double() for g in grads]
    got = torch.autograd.grad(out, inputs, grads, retain_graph=True)
    close(got, torch.autograd.grad(expected, inputs64, grads64, retain_graph=True), 2 * tolerance(dtype))
    # One output alone.
    got = torch.autograd.grad(out[0], inputs, grads[0], retain_graph=True)
    close(got, torch.autograd.grad(expected[0], inputs64, grads64[0], retain_graph=True), 2 * tolerance(dtype))
    assert torch.equal(torch.autograd.grad(out[1], inputs[1], grads[1])[0], grads[1])


def test_rms_norm_of_a_slice():
    """Latent attention normalises a part of a wider projection."""
    torch.manual_seed(0)
    x = torch.randn(37, 96, device=DEVICE)[:, :48].requires_grad_()
    weight = torch.randn(48, device=DEVICE, requires_grad=True)
    out, inputs64 = rms_norm(x, weight, 1e-6), wide([x, weight])
    expected = rms_norm_reference(*inputs64, 1e-6)
    close((out,), (expected,), 1e-6)
    grad = torch.randn_like(out)
    close(torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, inputs64, grad.double()), 1e-6)


def test_gradients_are_repeatable_bit_for_bit():
    inputs, grads, run = heads_case(HEADS[-1], DTYPES[-1])
    first = torch.autograd.grad(run(qk_norm_rope, inputs), inputs, grads)
    again = torch.autograd.grad(run(qk_norm_rope, inputs), inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fused_model_has_transformers_loss_and_gradients(checkpointing):
    """float32, packed documents; plain Transformers with eager experts is the reference."""
    config = tiny_config("qwen3_moe")
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    plain.load_state_dict(fused.state_dict())
    fused, plain = fused.cuda().train(), plain.cuda().train()
    if checkpointing:
        enable_activation_checkpointing(fused)
    ids = torch.randint(0, 256, (2, 48), device="cuda")
    positions = torch.cat([torch.arange(17), torch.arange(31)]).expand(2, 48).cuda()
    losses = [
        model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss for model in (fused, plain)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-3, name
