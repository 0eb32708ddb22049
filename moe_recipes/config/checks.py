"""Rules over several sections of a recipe, and over a recipe with its model config. They accept or raise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_recipes.config.errors import RecipeError
from moe_recipes.config.recipe import Recipe
from moe_recipes.families import EXPERT_COUNT_KEYS, PUBLISHED, family_of

PACKAGE_PREFIX = "package:"
HUB_DATA_PREFIX = "hf:"
COUNT = re.compile(r"(num|n)_|.*_size$")
"""Keys of a config.json that hold whole numbers."""

LARGEST_RATE = 1e30
"""Beyond this a float32 update is no number any more; a run that needs less than that to diverge ends with 17."""


def check_recipe(recipe: Recipe) -> None:
    """Accept the recipe or say which keys do not go together.

    Raises:
        RecipeError: names the key, its value and a way to mend it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        raise RecipeError(f"name={recipe.name!r} must be letters, digits, '.', '_' and '-': it names the run folder")
    _check_ranges(recipe)
    _check_model(recipe)
    _check_data(recipe)
    ep_size, fsdp_size = recipe.parallel.ep_size, recipe.parallel.fsdp_size
    if fsdp_size % ep_size:
        raise RecipeError(
            f"parallel.ep_size={ep_size} must divide parallel.fsdp_size={fsdp_size}: the ranks that hold distinct"
            " experts are some of those that shard the dense parameters"
        )
    if recipe.optim.warmup_steps > recipe.train.steps:
        raise RecipeError(
            f"optim.warmup_steps={recipe.optim.warmup_steps} is more than train.steps={recipe.train.steps}:"
            " the peak learning rate would never be reached"
        )


def _check_ranges(recipe: Recipe) -> None:
    parallel, data, optim, train = recipe.parallel, recipe.data, recipe.optim, recipe.train
    checkpoint, log = recipe.checkpoint, recipe.log
    whole = {
        "parallel.fsdp_size": (parallel.fsdp_size, 1),
        "parallel.ep_size": (parallel.ep_size, 1),
        "parallel.dp_replicate_size": (parallel.dp_replicate_size, 1),
        "parallel.expert_capacity_factor": (parallel.expert_capacity_factor, 0.01),
        "data.seq_len": (data.seq_len, 2),
        "train.steps": (train.steps, 1),
        "train.micro_batch_size": (train.micro_batch_size, 1),
        "train.grad_accum_steps": (train.grad_accum_steps, 1),
        "train.seed": (train.seed, 0),
        "train.validate_every_steps": (train.validate_every_steps, 0),
        "train.validation_batches": (train.validation_batches, 1),
        "optim.warmup_steps": (optim.warmup_steps, 0),
        "optim.weight_decay": (optim.weight_decay, 0),
        "optim.max_grad_norm": (optim.max_grad_norm, 0),
        "checkpoint.every_steps": (checkpoint.every_steps, 0),
        "checkpoint.keep_last": (checkpoint.keep_last, 1),
        "checkpoint.keep_best": (checkpoint.keep_best, 0),
        "log.every_steps": (log.every_steps, 1),
        "log.expert_load_every_steps": (log.expert_load_every_steps, 0),
        "kernels.loss_chunk_tokens": (recipe.kernels.loss_chunk_tokens, 1),
    }
    for key, (value, least) in whole.items():
        if value < least:
            raise RecipeError(f"{key}={value} must be at least {least}")
    for key, number in (("optim.lr", optim.lr), ("optim.eps", optim.eps)):
        if not 0 < number <= LARGEST_RATE:
            raise RecipeError(f"{key}={number} must be more than 0 and at most {LARGEST_RATE:g}")
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate", "mtp_loss_coef"):
        number = getattr(train, name)
        if number is not None and not 0 <= number <= 1:
            raise RecipeError(f"train.{name}={number} must lie between 0 and 1")
    if checkpoint.mtbf_hours is not None and not 0 < checkpoint.mtbf_hours < 1e6:
        raise RecipeError(f"checkpoint.mtbf_hours={checkpoint.mtbf_hours} must be more than 0 and less than a million")
    if not 0 <= optim.min_lr_ratio <= 1:
        raise RecipeError(f"optim.min_lr_ratio={optim.min_lr_ratio} must lie between 0 and 1")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise RecipeError(f"optim.betas={list(optim.betas)} must be two numbers, each at least 0 and less than 1")
    if not 0 <= data.validation_fraction < 1:
        raise RecipeError(f"data.validation_fraction={data.validation_fraction} must be at least 0 and less than 1")


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    packaged = model.source.startswith(PACKAGE_PREFIX)
    if not model.source:
        raise RecipeError("model.source is empty; give a folder, a Hugging Face id or package:NAME")
    if model.config_overrides and model.weights != "random":
        raise RecipeError(
            f"model.config_overrides ({', '.join(model.config_overrides)}) would not fit pretrained weights;"
            " remove it or set model.weights: random"
        )
    if packaged and model.weights != "random":
        raise RecipeError(f"model.source={model.source!r} is a config without weights; set model.weights: random")
    if packaged and model.revision is not None:
        raise RecipeError(
            f"model.revision={model.revision!r} needs a Hugging Face id, but model.source={model.source!r}"
        )
    if packaged and model.tokenizer is None and recipe.data.format != "random_tokens":
        raise RecipeError(f"model.source={model.source!r} has no tokenizer; set model.tokenizer to a folder or an id")
    if recipe.optim.name in ("lean_adamw", "flash_adamw") and model.dtype != "bfloat16":
        raise RecipeError(
            f"optim.name={recipe.optim.name} keeps an exact float32 master beside bfloat16 weights, but"
            f" model.dtype={model.dtype}; set model.dtype: bfloat16 or optim.name: adamw"
        )


def _check_data(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    if data.format == "random_tokens":
        given = [key for key in ("train", "validation", "validation_fraction") if getattr(data, key)]
        if given:
            raise RecipeError(
                f"data.format=random_tokens reads no rows; remove {', '.join(f'data.{k}' for k in given)}"
            )
    elif not data.train:
        raise RecipeError(
            "data.train is empty; list files, folders or hf: data sets, or set data.format: random_tokens"
        )
    if data.validation and data.validation_fraction:
        raise RecipeError(
            f"data.validation and data.validation_fraction={data.validation_fraction} exclude each other; keep one"
        )
    if train.validate_every_steps and not (data.validation or data.validation_fraction):
        raise RecipeError(
            f"train.validate_every_steps={train.validate_every_steps} has nothing to validate on; set data.validation"
            " or data.validation_fraction"
        )
    if data.revision is not None:
        foreign = [name for name in (*data.train, *data.validation) if not name.startswith(HUB_DATA_PREFIX)]
        if foreign or not data.train:
            named = repr(foreign[0]) if foreign else "random tokens"
            raise RecipeError(f"data.revision={data.revision!r} applies to hf: data sets only, not to {named}")


def check_model_config(recipe: Recipe, model_config: Mapping[str, Any]) -> None:
    """Accept the recipe for a model's config.json, or say what does not fit.

    Args:
        model_config: config.json with ``model.config_overrides`` applied.
    Raises:
        RecipeError: another family than the published model's, experts that cannot be spread over ``ep_size`` ranks,
            a row that is longer than the model's positions, or text where the config needs a number.
    """
    _check_family(recipe, model_config)
    text_config = model_config.get("text_config")
    config = {**model_config, **(text_config if isinstance(text_config, Mapping) else {})}
    ep_size, source = recipe.parallel.ep_size, recipe.model.source
    if wrong := next((name for name, value in config.items() if isinstance(value, str) and COUNT.match(name)), None):
        raise RecipeError(f"{wrong}={config[wrong]!r} of {source} must be a whole number; mend its config.json")
    key = next((name for name in EXPERT_COUNT_KEYS if config.get(name)), None)
    if key is None:
        if ep_size > 1:
            raise RecipeError(
                f"parallel.ep_size={ep_size}, but {source} has no experts that can be spread over ranks (model_type"
                f" {config.get('model_type', 'unknown')!r}); set parallel.ep_size: 1"
            )
    elif config[key] % ep_size:
        raise RecipeError(f"parallel.ep_size={ep_size} must divide the {config[key]} experts ({key}) of {source}")
    else:
        per_token = config.get("num_experts_per_tok") or 0
        if per_token > config[key]:
            raise RecipeError(f"num_experts_per_tok={per_token} is more than {key}={config[key]} of {source}")
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and recipe.data.seq_len > longest:
        raise RecipeError(
            f"data.seq_len={recipe.data.seq_len} is more than max_position_embeddings={longest} of {source}"
        )


def _check_family(recipe: Recipe, model_config: Mapping[str, Any]) -> None:
    family, source = family_of(model_config), recipe.model.source
    if source in PUBLISHED and (family is None or PUBLISHED[source] not in family.published):
        raise RecipeError(
            f"model.source={source!r} has a config.json of model_type {model_config.get('model_type')!r}, which is not"
            " that model's; fetch the model again"
        )


def recipe_notes(recipe: Recipe) -> list[str]:
    """What is allowed but rarely meant, one line each; the command line shows them."""
    notes = []
    if recipe.optim.name == "adamw" and recipe.model.dtype == "bfloat16":
        notes.append(
            "optim.name=adamw on bfloat16 weights rounds small updates away; use optim.name: lean_adamw or"
            " model.dtype: float32"
        )
    if recipe.checkpoint.keep_best and not recipe.train.validate_every_steps:
        notes.append("checkpoint.keep_best keeps none without validation losses; set train.validate_every_steps")
    if recipe.checkpoint.every_steps == 0 and not recipe.checkpoint.save_last:
        notes.append("no checkpoint is saved unless the run is asked to stop; set checkpoint.every_steps")
    return notes
