"""The verb ``train``: train a recipe on this host, or as one of the ranks that torchrun or srun started."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping

from moe_recipes.config.checks import check_model_config, check_recipe, recipe_notes
from moe_recipes.config.errors import EXIT_OK, EnvironmentMismatchError, RecipeError
from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder, check_run, prepare_run, run_folder_of
from moe_recipes.launch.arguments import add_cpu, add_json, add_overrides, add_recipe
from moe_recipes.launch.local import run_ranks
from moe_recipes.launch.operator.slurm import may_be_there
from moe_recipes.launch.slurm.lock import local_lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_cpu(parser)
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    folder = run_folder_of(recipe)
    command = rank_command("moe_recipes.train", folder, recipe, cpu=options.cpu)
    rank = started_rank(os.environ, recipe.parallel.num_ranks)
    if rank is None:
        _check_model(recipe)
        prepare_run(recipe, folder)
        _print_notes(recipe)
        return run_here(command, recipe, folder, options, uses_status=True)
    prepare_rank(recipe, folder, rank)
    sys.stdout.flush()
    os.execv(sys.executable, command)


def prepare_rank(recipe: Recipe, folder: RunFolder, rank: int) -> None:
    """What one of several ranks that others started does before it trains: rank 0 makes the run folder.

    Raises:
        MissingInputError: the model is not here.
        RecipeError: the recipe does not fit the model, or the run was started with another recipe.
        CannotWriteError: the run folder cannot be written.
    """
    _check_model(recipe)
    if rank != 0:
        check_run(recipe, folder)
        return
    prepare_run(recipe, folder)
    folder.write_status("starting")
    _print_notes(recipe)


def _check_model(recipe: Recipe) -> None:
    config, _, _ = read_model_config(recipe.model)
    check_model_config(recipe, config)


def rank_command(module: str, folder: RunFolder, recipe: Recipe, *, cpu: bool) -> list[str]:
    """What every rank runs. The recipe travels along, so that no rank waits for recipe.json to appear."""
    words = [sys.executable, "-m", module, str(folder.path), "--recipe-json", json.dumps(recipe_to_dict(recipe))]
    return [*words, "--cpu"] if cpu else words


def run_here(
    command: list[str], recipe: Recipe, folder: RunFolder, options: argparse.Namespace, *, uses_status: bool
) -> int:
    check_packages()
    terminal = sys.stderr.buffer if options.json else None
    with local_lock(folder, is_alive=may_be_there):
        code, cause = run_ranks(
            command, num_ranks=recipe.parallel.num_ranks, folder=folder, uses_status=uses_status, terminal=terminal
        )
    if options.json:
        answer = {"run": str(folder.path), "exit_code": code, "status": folder.read_status()}
        print(json.dumps(answer if code == EXIT_OK else {"error": cause, **answer}))
    return code


def check_packages() -> None:
    """Refuse a Python that cannot train: the host side of Slurm (`make host`) has the same commands and no torch.

    Raises:
        EnvironmentMismatchError: names the packages that are missing.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentMismatchError(
            f"{sys.executable} has no {' and no '.join(missing)}; run `make setup` and use .venv/bin/moe-recipes, or"
            " submit the work: moe-recipes launch"
        )


def started_rank(environ: Mapping[str, str], num_ranks: int) -> int | None:
    """This process's rank if torchrun or srun started it as one of several, else None.

    Raises:
        RecipeError: it was started with another number of ranks than the recipe has.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size, source = environ["RANK"], environ["WORLD_SIZE"], "WORLD_SIZE"
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        source = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        rank, size = environ["SLURM_PROCID"], environ.get(source, "")
    else:
        return None
    if not (rank.isdigit() and size.isdigit()):
        raise RecipeError(
            f"rank {rank!r} and {source}={size!r} in the environment must be numbers; start the ranks again"
        )
    if int(size) != num_ranks:
        raise RecipeError(
            f"{source}={size}, but the recipe has parallel.fsdp_size * parallel.dp_replicate_size = {num_ranks} ranks;"
            f" start {num_ranks} tasks or change the recipe"
        )
    return int(rank)


def _print_notes(recipe: Recipe) -> None:
    for note in recipe_notes(recipe):
        print(f"moe-recipes: note: {note}", file=sys.stderr)
