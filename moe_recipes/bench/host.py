"""What this host is made of."""

from __future__ import annotations

import os
import subprocess

from moe_recipes.config.checks import check_model_config, check_recipe
from moe_recipes.config.errors import EnvironmentMismatchError
from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.plan.parameters import count_parameters
from moe_recipes.plan.states import device_bytes


def gpus() -> list[str]:
    """``name, driver, memory`` of every GPU of this host, by nvidia-smi; empty without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES tells a child which GPU to take: those that this process may use."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [word for word in asked.split(",") if word] if asked is not None else [str(n) for n in range(len(gpus()))]


def check_arm(recipe: Recipe) -> None:
    """What would end an arm only after minutes. Without GPUs an arm runs on the CPU, which is there to try a tiny
    recipe: a real one would take all memory of the host, and other processes with it.

    Raises:
        RecipeError: the recipe, or its layout on this model, cannot be.
        MissingInputError, CorruptCheckpointError: no config of the model.
        EnvironmentMismatchError: no GPU, and less memory than the recipe's states need.
    """
    check_recipe(recipe)
    config, _, _ = read_model_config(recipe.model)
    check_model_config(recipe, config)
    count = None if gpus() else count_parameters(config)
    states = ((count and device_bytes(count, recipe)) or 0) * recipe.parallel.num_ranks
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if states > memory:
        raise EnvironmentMismatchError(
            f"no GPU here, and the {states / 2**30:,.0f} GiB of states of {recipe.name} do not fit into the"
            f" {memory / 2**30:,.0f} GiB of this host; run it on a host with GPUs"
        )
