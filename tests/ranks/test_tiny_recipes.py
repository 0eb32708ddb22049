"""The tiny recipe of every family trains on two ranks of the CPU."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.families import FAMILIES, family_of
from moe_recipes.runtime.sharding import local_tensor
from moe_recipes.runtime.world import World
from moe_recipes.train.loop import load_step, train_step
from moe_recipes.train.run import setup
from tests.ranks.launch import run_on_ranks
from tests.ranks.runs import records, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ("tiny_qwen3", "tiny_nemotron", "tiny_gpt_oss", "tiny_deepseek")


def train_two_steps(recipe: Recipe, folder: Path) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"), host="here")
    run = setup(recipe, RunFolder(folder), world)
    before = {name: local_tensor(p).detach().clone() for name, p in run.model.named_parameters()}
    vocab_size = run.source.vocab_size
    for step in range(2):
        stats = train_step(run, load_step(run, step))
        # Weights of a normal distribution of 0.02 say next to nothing: an even guess over the vocabulary.
        assert abs(stats.loss - math.log(vocab_size)) < 0.3
        assert 0 < stats.grad_norm < 100
        assert (stats.mtp_loss > 0) == (run.mtp_coef > 0)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(before[name], local_tensor(p))}
    experts = {name for name in before if ".experts." in name}
    assert experts <= moved
    # An expert or a bias that no token reaches has no gradient; every matrix of every layer has one.
    assert {name for name in before.keys() - moved if local_tensor(run.model.get_parameter(name)).ndim > 1} == set()


def test_every_family_has_a_tiny_recipe() -> None:
    found = {family_of(read_model_config(load_recipe(name).model)[0]) for name in TINY}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_recipe_of_each_family_trains(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    recipe = dataclasses.replace(recipe, run_dir=str(tmp_path))
    run_on_ranks(train_two_steps, recipe.parallel.num_ranks, recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_tiny_recipe_of_each_family_runs_to_its_export(name: str, tmp_path: Path) -> None:
    done = train(ROOT / "recipes" / f"{name}.yaml", tmp_path / "run")
    assert done.returncode == 0, done.stdout
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 9))
    assert all(math.isfinite(record["loss"]) for record in found)
    assert (tmp_path / "run" / "export" / "config.json").is_file()
