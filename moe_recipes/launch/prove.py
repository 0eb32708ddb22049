"""The verb ``prove``: a recipe's family, cut small, on 1, 2, 4 and 8 ranks of the CPU against plain Transformers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_recipes.config.checks import check_recipe
from moe_recipes.config.errors import MissingInputError, RecipeError
from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Data, Model, Optim, Recipe, Train
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.families import family_of
from moe_recipes.launch.arguments import add_json, add_overrides
from moe_recipes.launch.rehearse import beside_run, model_without_weights, run_module
from moe_recipes.launch.train import check_packages
from moe_recipes.plan.small_model import NARROW, few_layers, narrow_widths

SUFFIX = "-proof"
MOST_RANKS_OF_EXPERTS = 4
EXPERTS_A_TOKEN = 2
TOP_K_KEYS = (
    "num_experts_per_tok", "experts_per_token", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"
)  # fmt: skip
WINDOW = 8
NOT_PROVED = {"router_z_loss_coef": 0.0, "router_bias_update_rate": 0.0}
"""Keys of ``train`` that are switched off: what they add is not in the reference."""

MTP_KEY = "num_nextn_predict_layers"
AUX_LOSS_COEF = MTP_LOSS_COEF = 0.5
"""In place of a recipe's own, which is too small to show among the gradients of the cross-entropy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE|MODEL", help="a recipe, as for `train`, or the folder of a model of your own"
    )
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    if Path(options.recipe).is_dir():
        recipe = recipe_of_folder(Path(options.recipe), options.overrides)
    else:
        recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    check_packages()
    proof, notes = proof_recipe(recipe)
    folder = beside_run(recipe, SUFFIX)
    words = ["moe_recipes.prove", str(folder), "--recipe-json", json.dumps(recipe_to_dict(proof))]
    words += [word for note in notes for word in ("--note", note)]
    return run_module([*words, *["--json"] * options.json])


def recipe_of_folder(folder: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe with default settings for a user's own model.

    Raises:
        MissingInputError: the folder has no config.json. RecipeError: overrides were given; they belong into a recipe.
    """
    if not (folder / "config.json").is_file():
        raise MissingInputError(f"{folder}: the folder holds no config.json; name a recipe, or a model's folder")
    if overrides:
        raise RecipeError("--set needs a recipe; for a folder's model write one with model.source: FOLDER")
    name = folder.resolve().name
    return Recipe(
        name=name,
        run_dir=f"runs/{name}",
        model=Model(source=str(folder), dtype="float32"),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )


def proof_recipe(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with a small float32 model of its family, and what its proof leaves out.

    Optimizer, kernels, loss, dispatcher, recomputation, betas and decay stay the recipe's. The layout is set for each
    number of ranks by the proof itself.

    Raises:
        MissingInputError: the model's config.json is not here. RecipeError: its layers cannot be cut.
    """
    notes = []
    model = model_without_weights(recipe.model)
    config = read_model_config(model)[0]
    cuts, family = small_config(config), family_of(config)
    has_mtp = family is not None and family.mtp is not None and bool(config.get(MTP_KEY))
    if has_mtp:
        cuts[MTP_KEY] = 1
    model = replace(model, dtype="float32", config_overrides={**model.config_overrides, **cuts})
    if "flash" in model.attn_implementation:
        notes.append(f"model.attn_implementation={model.attn_implementation} needs a GPU; proved with sdpa")
        model = replace(model, attn_implementation="sdpa")
    optim = replace(recipe.optim, warmup_steps=0, schedule="constant")
    if optim.name == "flash_adamw":
        notes.append("optim.name=flash_adamw needs a GPU; proved with lean_adamw")
        optim = replace(optim, name="lean_adamw")
    train = recipe.train
    known = {field.name for field in dataclasses.fields(train)}
    off: dict[str, Any] = {key: value for key, value in NOT_PROVED.items() if key in known}
    notes += [f"train.{key}={getattr(train, key)} is switched off" for key in off if getattr(train, key)]
    off["mtp_loss_coef"] = MTP_LOSS_COEF if has_mtp and train.mtp_loss_coef != 0 else 0.0
    if train.mtp_loss_coef and not has_mtp:
        raise RecipeError(
            f"train.mtp_loss_coef={train.mtp_loss_coef}: the model has no multi-token-prediction layers; leave the key"
            " out"
        )
    if train.router_aux_loss_coef:
        off["router_aux_loss_coef"] = AUX_LOSS_COEF
    if "quantization_config" in cuts:
        notes.append("the source is quantised; proved with float32 weights")
    small = replace(
        recipe,
        name=f"{recipe.name}{SUFFIX}",
        model=model,
        data=replace(recipe.data, train=(), validation=(), validation_fraction=0.0, revision=None, cache_dir=None,
                     format="random_tokens", seq_len=32),
        optim=optim,
        train=replace(train, steps=4, deterministic=False, validate_every_steps=0, **off),
        kernels=replace(recipe.kernels, loss_chunk_tokens=24),
        log=replace(recipe.log, wandb="off"),
    )  # fmt: skip
    return small, notes


def small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of config.json: one layer of each kind, narrow, 8 experts with 2 a token, short attention windows."""
    cuts = few_layers(config) | narrow_widths(config, ep_size=MOST_RANKS_OF_EXPERTS)
    for key in [key for key in cuts if key.endswith("per_layer_config")]:
        cuts[key] = {layer: _narrow_layer(own) for layer, own in cuts[key].items()}
    text = config.get("text_config")
    prefix, inner = ("text_config.", text) if isinstance(text, Mapping) else ("", config)
    for key in TOP_K_KEYS:
        if isinstance(inner.get(key), int):
            cuts[f"{prefix}{key}"] = min(inner[key], EXPERTS_A_TOKEN)
    if (inner.get("n_group") or 1) > 1:
        cuts |= {f"{prefix}n_group": 4, f"{prefix}topk_group": 2}
    for key in ("sliding_window", "attention_chunk_size"):
        if isinstance(inner.get(key), int):
            cuts[f"{prefix}{key}"] = min(inner[key], WINDOW)
    if config.get("quantization_config"):
        cuts["quantization_config"] = None
    return cuts


def _narrow_layer(own: Mapping[str, Any]) -> dict[str, Any]:
    """The widths that a layer has of its own, at most twice those of the other layers, so that they stay different."""
    found = {name: min(value, 2 * NARROW[name]) if name in NARROW else value for name, value in own.items()}
    if "num_key_value_heads" in own and own["num_key_value_heads"] == own.get("num_attention_heads"):
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found
