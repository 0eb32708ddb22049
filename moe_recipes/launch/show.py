"""The verb ``show``: print the resolved recipe and what follows from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from moe_recipes.config.checks import PACKAGE_PREFIX, check_model_config, check_recipe, recipe_notes
from moe_recipes.config.errors import EXIT_OK, MissingInputError
from moe_recipes.config.model_config import PACKAGED_NAMES, read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import dump, load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import run_folder_of
from moe_recipes.launch.arguments import add_json, add_overrides, add_recipe
from moe_recipes.plan.flops import train_flops_per_token
from moe_recipes.plan.parameters import count_parameters
from moe_recipes.plan.states import checkpoint_bytes, device_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    derived = derived_facts(recipe)
    if options.json:
        print(
            json.dumps({"recipe": recipe_to_dict(recipe), "derived": derived, "notes": recipe_notes(recipe)}, indent=2)
        )
        return EXIT_OK
    print(dump(recipe), end="")
    print("\n# What follows from it")
    for key, value in derived.items():
        print(f"# {key + ':':24}{f'{value:,}' if isinstance(value, int) else value}")
    for note in recipe_notes(recipe):
        print(f"# note: {note}")
    return EXIT_OK


def derived_facts(recipe: Recipe) -> dict[str, Any]:
    """What the recipe implies, in the order in which it is shown. A model config that is not here is said, not raised.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    facts: dict[str, Any] = {
        "run folder": str(run_folder_of(recipe).path),
        "ranks": recipe.parallel.num_ranks,
        "efsdp_size": recipe.parallel.efsdp_size,
        "rows a step": recipe.rows_per_step,
        "tokens a step": recipe.tokens_per_step,
        "tokens in the run": recipe.tokens_per_step * recipe.train.steps,
    }
    try:
        config, _, source = read_model_config(recipe.model)
    except MissingInputError as error:
        packaged = PACKAGED_NAMES.get(recipe.model.source)
        if packaged is None:
            return {**facts, "parameters": f"unknown: {error}"}
        stand_in = dataclasses.replace(recipe.model, source=f"{PACKAGE_PREFIX}{packaged}", revision=None)
        config, _, source = read_model_config(stand_in)
        facts["model"] = f"not here: {error}"
    check_model_config(recipe, config)
    facts["model config"] = source
    count = count_parameters(config)
    if count is None:
        facts["parameters"] = f"not counted for model_type {config.get('model_type')!r}"
    else:
        facts |= {"parameters": count.total, "parameters a token": count.active, "in routed experts": count.routed}
        if count.mtp:
            facts["predict further tokens"] = count.mtp
        states, checkpoint = device_bytes(count, recipe), checkpoint_bytes(count, recipe)
        if states is not None and checkpoint is not None:
            facts |= {"bytes of states a rank": states, "bytes of a checkpoint": checkpoint}
    flops = train_flops_per_token(config, seq_len=recipe.data.seq_len)
    if flops is not None:
        facts["training FLOPs a token"] = f"{flops:.4g}"
    return facts
