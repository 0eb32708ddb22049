"""The global gradient norm counts every element once, and frozen parameters stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_recipes.runtime.sharding import local_tensor
from moe_recipes.train.loop import train_step
from moe_recipes.train.optim import GradientClip, build_optimizer
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import build_run, rank_batches, save_weights, whole


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    for family in ("qwen3_moe", "deepseek_v3"):
        run_on_ranks(save_weights, 1, family, root / family)
    return root


def fill_gradients(model: torch.nn.Module, value: float) -> int:
    """Every gradient element becomes ``value``. Returns the number of elements in the whole model."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return sum(parameter.numel() for parameter in model.parameters())  # of a DTensor: of the whole


def clipped_norm(model: torch.nn.Module, max_norm: float) -> float:
    """Clip as a step does; the norm before it."""
    clip = GradientClip(model, max_norm=max_norm, rank=dist.get_rank())
    norm = float(clip.norm())
    clip.scale(norm, torch.optim.SGD(model.parameters(), lr=0.1))
    return norm


def check_norm(folder: Path, ep_size: int, dp_replicate_size: int) -> None:
    model = build_run(folder / "qwen3_moe", ep_size=ep_size, dp_replicate_size=dp_replicate_size).model
    count = fill_gradients(model, 0.5)
    norm = 0.5 * count**0.5
    assert clipped_norm(model, 0.0) == pytest.approx(norm, rel=1e-6)
    assert all(bool((local_tensor(parameter.grad) == 0.5).all()) for parameter in model.parameters())
    assert clipped_norm(model, 2 * norm) == pytest.approx(norm, rel=1e-6)
    assert all(bool((local_tensor(parameter.grad) == 0.5).all()) for parameter in model.parameters())
    assert clipped_norm(model, norm / 4) == pytest.approx(norm, rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = torch.full(parameter.shape, 0.125)
        torch.testing.assert_close(whole(parameter.grad), expected, rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "dp_replicate_size"), [(1, 1, 1), (2, 2, 1), (3, 1, 1), (4, 2, 1), (4, 2, 2), (2, 1, 2)]
)
def test_every_element_counts_once(weights, num_ranks, ep_size, dp_replicate_size):
    run_on_ranks(check_norm, num_ranks, weights, ep_size, dp_replicate_size)


def check_whole_tensors_beside_shards(folder: Path) -> None:
    """A parameter that every rank holds whole, such as one that FSDP was told to leave alone."""
    model = build_run(folder / "qwen3_moe", ep_size=2).model
    count = fill_gradients(model, 0.5)
    extra = torch.nn.Parameter(torch.zeros(1000))
    extra.grad = torch.full_like(extra, 0.5)
    model.register_parameter("extra", extra)
    assert isinstance(next(model.parameters()), torch.Tensor)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert clipped_norm(model, 0.0) == pytest.approx(0.5 * (count + 1000) ** 0.5, rel=1e-6)


def test_a_parameter_that_all_ranks_hold_whole_counts_once(weights):
    run_on_ranks(check_whole_tensors_beside_shards, 2, weights)


def check_frozen(folder: Path) -> None:
    run = build_run(folder / "deepseek_v3", ep_size=2, checkpointing="full")
    frozen = []
    for name, parameter in run.model.named_parameters():
        if "layers.1." in name or name.endswith("gate.weight") or "embed" in name:
            parameter.requires_grad_(False)
            frozen.append(name)
    run.optimizer = build_optimizer(run.model, run.recipe.optim)
    run.clip = GradientClip(run.model, max_norm=run.recipe.optim.max_grad_norm, rank=dist.get_rank())
    before = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    for _ in range(2):
        train_step(run, rank_batches("deepseek_v3"))
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert any(".experts." in name for name in frozen)
    for name, tensor in run.model.state_dict().items():
        same = torch.equal(whole(tensor), before[name])
        assert same == (name in frozen or name in biases), name


def test_frozen_parameters_and_router_biases_do_not_move(weights):
    run_on_ranks(check_frozen, 2, weights)
