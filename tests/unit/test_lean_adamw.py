"""The lean optimizer: an exact master, moments that follow float32 ones, the same bits on every layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from moe_recipes.kernels.lean_adamw import BLOCK, Step, combined_master, split_master, step_reference
from moe_recipes.train.lean_adamw import LeanAdamW
from tests.unit.lean_parts import KINDS, STATE, copied, differing, new_part

STEP = Step(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, number=1)


def test_weight_and_remainder_are_the_master_bit_for_bit():
    torch.manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    master = bits.view(torch.float32)
    master = torch.cat([master[master.isfinite()], torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-149])])
    weight, remainder = split_master(master)
    assert torch.equal(combined_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    # The weight is the nearest bfloat16; torch rounds ties to even, so a few of 65,536 differ by one unit.
    usual = master.bfloat16().view(torch.int16).to(torch.int32)
    assert (weight.view(torch.int16).to(torch.int32) - usual).abs().max() <= 1
    assert (weight.view(torch.int16) != master.bfloat16().view(torch.int16)).float().mean() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_from_zero_moments_is_torchs_adamw(kind):
    torch.manual_seed(0)
    part, grad = new_part(4 * BLOCK, kind=kind), torch.randn(4 * BLOCK)
    plain = nn.Parameter(part.weight.float())
    plain.grad = grad * 0.5
    torch.optim.AdamW([plain], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    step_reference([part], [grad], dataclasses.replace(STEP, grad_factor=0.5))
    master = part.weight if part.remainder is None else combined_master(part.weight, part.remainder)
    torch.testing.assert_close(master, plain.detach(), rtol=0, atol=3e-7)


def test_codes_are_unbiased_and_close():
    torch.manual_seed(0)
    start = new_part(64 * BLOCK, kind="codes")
    grad = torch.randn(64 * BLOCK) * torch.rand(64 * BLOCK) ** 3
    exact = copied(start, "cpu")
    float_part = dataclasses.replace(
        exact, exp_avg=torch.zeros(64 * BLOCK), exp_avg_sq=torch.zeros(64 * BLOCK), exp_avg_scale=None,
        exp_avg_sq_scale=None,
    )  # fmt: skip
    step_reference([float_part], [grad], STEP)
    means = {"exp_avg": torch.zeros(64 * BLOCK), "exp_avg_sq": torch.zeros(64 * BLOCK)}
    tries = 200
    for seed in range(tries):
        part = dataclasses.replace(copied(start, "cpu"), seed=seed * 7919)
        step_reference([part], [grad], STEP)
        assert part.exp_avg_scale is not None
        assert part.exp_avg_sq_scale is not None
        for name, levels, scale in (("exp_avg", 127, part.exp_avg_scale), ("exp_avg_sq", 255, part.exp_avg_sq_scale)):
            share = getattr(part, name).float() / levels
            value = (share.abs() * share).view(-1, BLOCK) * scale.unsqueeze(1)
            means[name] += value.flatten() / tries
            largest = float(value.abs().max())
        assert (part.exp_avg_sq[grad != 0] > 0).all()
    for name, wanted in (("exp_avg", float_part.exp_avg), ("exp_avg_sq", float_part.exp_avg_sq.sqrt())):
        error = (means[name] - wanted).abs()
        step_size = 2 * wanted.abs().sqrt() * float(wanted.abs().max()) ** 0.5 / 127 + largest / 127**2
        assert float((error / step_size).mean()) < 0.1  # of one code's distance: 1/sqrt(200) is 0.07


def test_two_shards_step_as_the_whole_does():
    torch.manual_seed(0)
    whole, grad = new_part(6 * BLOCK, kind="codes"), torch.randn(6 * BLOCK)
    cut = 2 * BLOCK
    shards = []
    for first, last in ((0, cut), (cut, 6 * BLOCK)):
        tensors = {}
        for name in STATE:
            each = BLOCK if name.endswith("scale") else 1
            tensors[name] = getattr(whole, name)[first // each : last // each].clone()
        shards.append(dataclasses.replace(whole, **tensors, offset=first))
    for number in range(1, 4):
        step = dataclasses.replace(STEP, number=number)
        step_reference([whole], [grad], step)
        step_reference(shards, [grad[:cut], grad[cut:]], step)
    for name in STATE:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(shard, name) for shard in shards])), name
    other = dataclasses.replace(whole, seed=8)
    step_reference([other], [grad], step)
    assert "exp_avg" not in differing(whole, copied(whole, "cpu"))


def regression(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128)).to(torch.bfloat16).to(dtype)
    return model, torch.randn(256, 128), torch.randn(256, 128)


def trained(optimizer_of, dtype: torch.dtype, *, lr: float, steps: int) -> tuple[float, float, nn.Module]:
    """Final loss in float32, and the share of weights that moved."""
    model, x, y = regression(dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = optimizer_of(model, lr)
    for _ in range(steps):
        loss = (model(x.to(dtype)) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [(a != b.detach()).float().mean() * a.numel() for a, b in zip(before, model.parameters(), strict=True)]
    return float(loss), float(sum(changed)) / sum(a.numel() for a in before), model


def lean(model: nn.Module, lr: float) -> LeanAdamW:
    names, parameters = zip(*model.named_parameters(), strict=True)
    groups = [{"params": list(parameters), "names": list(names), "weight_decay": 0.0}]
    return LeanAdamW(groups, lr=lr)


def test_it_follows_float32_adamw_where_bfloat16_adam_stands_still():
    def plain(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    exact_loss, _, exact = trained(plain, torch.float32, lr=1e-5, steps=300)
    lean_loss, lean_moved, _ = trained(lean, torch.bfloat16, lr=1e-5, steps=300)
    stuck_loss, stuck_moved, _ = trained(plain, torch.bfloat16, lr=1e-5, steps=300)
    start, _, _ = regression(torch.float32)
    wanted = [
        (a.bfloat16() != b.bfloat16()).float().flatten()
        for a, b in zip(exact.parameters(), start.parameters(), strict=True)
    ]
    exact_moved = float(torch.cat(wanted).mean())
    assert lean_loss == pytest.approx(exact_loss, rel=5e-3)
    assert lean_moved == pytest.approx(exact_moved, abs=0.01)
    assert stuck_moved < exact_moved - 0.2
    assert abs(stuck_loss - exact_loss) > 4 * abs(lean_loss - exact_loss)


def test_no_gradient_no_change_and_no_phantom_update():
    model, _, _ = regression(torch.bfloat16)
    optimizer = lean(model, 1e-3)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(5):
        optimizer.step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(weights, model.parameters(), strict=True))


def test_it_refuses_weights_of_another_dtype_and_closures():
    with pytest.raises(ValueError, match=r"weight is torch\.float64; weights must be bfloat16 or float32"):
        lean(nn.Linear(4, 4, dtype=torch.float64), 1e-3)
    with pytest.raises(ValueError, match="no closure"):
        lean(nn.Linear(4, 4), 1e-3).step(lambda: 0.0)
