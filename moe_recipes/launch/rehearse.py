"""The verb ``rehearse``: the true model on the meta device, as the ranks of the recipe's mesh would hold it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_recipes.config.checks import PACKAGE_PREFIX, check_model_config, check_recipe
from moe_recipes.config.errors import MissingInputError
from moe_recipes.config.model_config import PACKAGED_NAMES, read_model_config
from moe_recipes.config.recipe import Model, Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import run_folder_of
from moe_recipes.launch.arguments import add_json, add_overrides, add_recipe
from moe_recipes.launch.train import check_packages

SUFFIX = "-rehearsal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--all", action="store_true", help="build the model as every rank, not as a sample of them")
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    recipe = replace(recipe, model=model_without_weights(recipe.model))
    check_model_config(recipe, read_model_config(recipe.model)[0])
    check_packages()
    words = ["moe_recipes.prove.rehearse", str(beside_run(recipe, SUFFIX)), "--recipe-json"]
    words += [json.dumps(recipe_to_dict(recipe)), *["--all"] * options.all, *["--json"] * options.json]
    return run_module(words)


def beside_run(recipe: Recipe, suffix: str) -> Path:
    """A folder beside the run's own."""
    run = run_folder_of(recipe).path
    return run.with_name(f"{run.name}{suffix}")


def model_without_weights(model: Model) -> Model:
    """The model section for work that needs a config.json alone: where the model is not here, the package's copy.

    Raises:
        MissingInputError: it is not here, and the package has no copy.
    """
    random = replace(model, weights="random", tokenizer=None)
    try:
        read_model_config(random)
    except MissingInputError:
        if model.source not in PACKAGED_NAMES:
            raise
        random = replace(random, source=f"{PACKAGE_PREFIX}{PACKAGED_NAMES[model.source]}", revision=None)
    return random


def run_module(words: Sequence[str]) -> int:
    """Run ``python -m`` of a module of this package on the CPU, one thread, and hand its exit code on."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", *words], env=environment, check=False).returncode
    return code if code >= 0 else 128 - code
