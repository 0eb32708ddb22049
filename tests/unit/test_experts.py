"""Expert computation against the eager experts of Transformers and against the slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moe_recipes.models.blocks import moe_blocks
from moe_recipes.moe.experts import expert_mlp, routed_experts, sort_by_expert
from moe_recipes.moe.reference import experts_reference
from tests.ranks.parity import boost
from tests.tiny_models import tiny_config

TOKENS, TOP_K, EXPERTS = 50, 2, 8
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")


def experts_of(family: str) -> nn.Module:
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    model.set_experts_implementation("eager")
    boost(model)
    return moe_blocks(model)[0].experts


def routing(kind: str) -> torch.Tensor:
    """int64 [T, K], different experts for each token."""
    generator = torch.Generator().manual_seed(1)
    if kind == "skewed":  # every token picks expert 5, the others are drawn; 0 and 7 stay empty
        other = torch.tensor([1, 2, 3, 4, 6])[torch.randint(0, 5, (TOKENS,), generator=generator)]
        return torch.stack([torch.full((TOKENS,), 5), other], dim=1)
    return torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices


def inputs(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and routing weights (leaves), and a gradient for the output."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, width, generator=generator).requires_grad_()
    weight = torch.rand(TOKENS, TOP_K, generator=generator).requires_grad_()
    return x, weight, torch.randn(TOKENS, width, generator=generator)


def width_of(experts: nn.Module) -> int:
    return experts.down_proj.shape[2 if experts.is_transposed else 1]


@pytest.mark.parametrize("kind", ["random", "skewed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_transformers_eager(family, kind):
    experts, index = experts_of(family), routing(kind)
    x, weight, grad = inputs(width_of(experts))
    leaves = [x, weight, *experts.parameters()]
    got = routed_experts(experts, x, index, weight)
    want = experts(x, index, weight)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True)
    for value, expected in pairs:
        assert float((value - expected).norm()) <= 1e-6 * float(expected.norm())


def test_against_the_slow_reference():
    experts, index = experts_of("qwen3_moe"), routing("skewed")
    x, weight, grad = inputs(64)
    leaves = [x, weight, experts.gate_up_proj, experts.down_proj]
    got = routed_experts(experts, x, index, weight)
    want = experts_reference(x, index, weight, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True)
    for value, expected in pairs:
        assert float((value - expected).norm()) <= 1e-6 * float(expected.norm())


def test_slots_of_other_ranks_add_nothing():
    """Ids from ``num_experts`` up are experts elsewhere: their slots count as if their weight were zero."""
    experts, index = experts_of("qwen3_moe"), routing("random")
    elsewhere = index >= 5
    x, weight, grad = inputs(64)
    leaves = [x, weight, experts.gate_up_proj, experts.down_proj]
    got = routed_experts(experts, x, index.masked_fill(elsewhere, EXPERTS), weight, num_rows=int((~elsewhere).sum()))
    masked = weight * ~elsewhere
    want = experts_reference(x, index, masked, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True)
    for value, expected in pairs:
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_row_still_gives_every_expert_a_gradient(family, num_tokens):
    experts = experts_of(family)
    x = torch.randn(num_tokens, width_of(experts), requires_grad=True)
    weight = torch.rand(num_tokens, TOP_K, requires_grad=True)
    elsewhere = torch.full((num_tokens, TOP_K), EXPERTS)
    out = routed_experts(experts, x, elsewhere, weight, num_rows=0)
    assert out.shape == x.shape
    assert float(out.detach().abs().sum()) == 0.0
    out.sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) == 0.0, name
    assert x.grad is not None


def test_rows_of_an_expert_stay_in_token_order():
    index = routing("skewed")
    order = sort_by_expert(index, num_experts=EXPERTS)
    start = 0
    for expert, end in enumerate(order.ends_e.tolist()):
        tokens = (index == expert).any(dim=1).nonzero().flatten()
        assert torch.equal(order.rows.token_N[start:end], tokens)
        assert order.expert_N[start:end].eq(expert).all()
        start = end
    assert start == TOKENS * TOP_K


def test_each_row_goes_through_its_own_expert():
    experts, index = experts_of("gpt_oss"), routing("random")
    order = sort_by_expert(index, num_experts=EXPERTS)
    x = torch.randn(TOKENS * TOP_K, width_of(experts))
    got = expert_mlp(experts, x, order)
    for n in range(0, TOKENS * TOP_K, 7):
        alone = experts(x[n : n + 1], order.expert_N[n : n + 1, None].long(), torch.ones(1, 1))
        torch.testing.assert_close(got[n : n + 1], alone, rtol=1e-4, atol=1e-4)
