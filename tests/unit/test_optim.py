"""Learning rate by closed form, and which parameters get weight decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe_recipes.config.errors import EnvironmentMismatchError
from moe_recipes.config.recipe import Optim
from moe_recipes.train.optim import build_optimizer, learning_rate, parameter_groups


def rates(optim: Optim, steps: int) -> list[float]:
    return [learning_rate(optim, step=step, steps=steps) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak():
    optim = Optim(lr=2.0, warmup_steps=4, schedule="constant")
    assert rates(optim, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_follows_its_formula():
    optim = Optim(lr=2.0, warmup_steps=2, schedule="cosine", min_lr_ratio=0.25)
    got = rates(optim, 11)
    low, high = 0.5, 2.0
    want = [low + (high - low) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]
    assert got[:2] == [1.0, 2.0]
    assert got[2:] == pytest.approx(want, rel=1e-12)
    assert (got[2], got[6], got[10]) == pytest.approx((2.0, 1.25, 0.5))


def test_linear_falls_evenly_to_the_lowest_rate():
    optim = Optim(lr=1.0, schedule="linear", min_lr_ratio=0.1)
    assert rates(optim, 10) == pytest.approx([1 - 0.1 * k for k in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (3, 3), (3, 2)])
def test_short_runs_have_a_rate_for_every_step(schedule, steps, warmup_steps):
    got = rates(Optim(lr=1.0, schedule=schedule, warmup_steps=warmup_steps), steps)
    assert got[: max(1, warmup_steps)] == [(step + 1) / max(1, warmup_steps) for step in range(max(1, warmup_steps))]
    assert all(0 < rate <= 1 for rate in got)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.table = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.float64))


def test_every_trained_parameter_is_in_one_group():
    model = Small()
    groups = parameter_groups(model, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {
        "projection.weight": 0.3,
        "projection.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "table": 0.3,
    }
    assert sum(len(group["params"]) for group in groups) == len(decay)
    assert all(len({parameter.dtype for parameter in group["params"]}) == 1 for group in groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_flash_adamw_without_a_gpu_names_the_way_out():
    with pytest.raises(EnvironmentMismatchError, match=r"use optim\.name=lean_adamw"):
        build_optimizer(Small(), Optim(name="flash_adamw", lr=1.0))
