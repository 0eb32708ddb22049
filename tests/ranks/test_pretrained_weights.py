"""A pretrained folder that does not hold every weight of the model is refused by name; nothing is drawn instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moe_recipes.config.errors import CorruptCheckpointError, RecipeError
from moe_recipes.config.recipe import Data, Model, Optim, Parallel, Recipe, Train
from moe_recipes.models.build import build_model, read_source
from tests.ranks.launch import run_on_ranks
from tests.tiny_models import save_tiny_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.6."


def recipe_of(folder: Path, ep_size: int) -> Recipe:
    return Recipe(
        name="weights",
        model=Model(source=str(folder), dtype="float32"),
        parallel=Parallel(fsdp_size=2, ep_size=ep_size),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )


def check_refusal(folder: Path, ep_size: int, message: str) -> None:
    recipe = recipe_of(folder, ep_size)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefix)}


DAMAGE = {
    "dense": (without(Q_PROJ), rf"no weights for {Q_PROJ} \(1 tensors"),
    "layer of experts": (without("model.layers.1.mlp.experts."), r"no weights for model\.layers\.1\.mlp\.experts\."),
    "one expert": (without(EXPERT), r"model\.layers\.1\.mlp\.experts\.\w+ has another shape"),
    "shape": (lambda tensors: tensors | {Q_PROJ: torch.zeros(48, 64)}, f"{Q_PROJ} has another shape"),
    "expert's shape": (
        lambda tensors: tensors | {f"{EXPERT}up_proj.weight": torch.zeros(7, 64)},
        "experts of one layer that do not fit together",
    ),
}


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_all_ranks_refuse_weights_that_are_not_the_models(tmp_path: Path, ep_size: int, damage: str) -> None:
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    change, message = DAMAGE[damage]
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    run_on_ranks(check_refusal, 2, tmp_path, ep_size, message)


def check_dispatcher_refusal(folder: Path, name: str) -> None:
    recipe = recipe_of(folder, 2)
    parallel = dataclasses.replace(recipe.parallel, ep_implementation=name)
    with pytest.raises(RecipeError, match=f"^parallel.ep_implementation={name}: .*; leave the key out$"):
        build_model(
            dataclasses.replace(recipe, parallel=parallel),
            read_source(recipe),
            scratch=folder / f"scratch-{dist.get_rank()}",
        )


@pytest.mark.parametrize("name", ["all_to_al", "all_reduce"])
def test_a_dispatcher_that_cannot_serve_is_the_recipes_error(tmp_path: Path, name: str) -> None:
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    run_on_ranks(check_dispatcher_refusal, 2, tmp_path, name)
