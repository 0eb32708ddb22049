"""The command ``moe-recipes``: show a recipe, train it, export a run. Imports no torch; what needs torch is started.

moe-recipes show RECIPE      moe-recipes train RECIPE      moe-recipes export RUN
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import moe_recipes
from moe_recipes.config.checks import PACKAGE_PREFIX, check_model_config, check_recipe, recipe_notes
from moe_recipes.config.errors import EXIT_OK, MissingInputError, MoeRecipesError, RecipeError
from moe_recipes.config.model_config import PACKAGED_NAMES, read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import dump, load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder, check_run, prepare_run, run_folder_of
from moe_recipes.launch.local import ERROR_PREFIX, run_ranks
from moe_recipes.plan.parameters import count_parameters

EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are ours: one line, and the exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moe-recipes", description="Fine-tune mixture-of-experts models with expert parallelism.")
    parser.add_argument("--version", action="version", version=f"moe-recipes {moe_recipes.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="show | train | export", required=True)
    show = verbs.add_parser("show", help="print the resolved recipe and what follows from it")
    train = verbs.add_parser("train", help="train a recipe, or go on with its run")
    export = verbs.add_parser("export", help="write RUN/export from the run's newest checkpoint")
    for verb in (show, train):
        verb.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    export.add_argument("run", metavar="RUN", help="the folder of a run")
    for verb in (train, export):
        verb.add_argument("--cpu", action="store_true", help="stay on the CPU even where there are GPUs")
    for verb in (show, train, export):
        verb.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="replace one key"
        )
        verb.add_argument("--json", action="store_true", help="answer on stdout in JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; a user's error is one line on stderr, or JSON on stdout."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = make_parser().parse_args(words)
        if getattr(options, "cpu", False):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Transformers lays ranks out over any GPU that they can see
        verbs = {"show": _show, "train": _train, "export": _export}
        return verbs[options.verb](options)
    except MoeRecipesError as error:
        if "--json" in words:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        else:
            print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`). Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _show(options: argparse.Namespace) -> int:
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
    return facts


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    config, _, _ = read_model_config(recipe.model)
    check_model_config(recipe, config)
    folder = run_folder_of(recipe)
    command = _rank_command("moe_recipes.train", folder, recipe, cpu=options.cpu)
    rank = started_rank(os.environ, recipe.parallel.num_ranks)
    if rank is None:
        prepare_run(recipe, folder)
        _print_notes(recipe)
        return _run_here(command, recipe, folder, options, uses_status=True)
    if rank == 0:
        prepare_run(recipe, folder)
        folder.write_status("starting")
        _print_notes(recipe)
    else:
        check_run(recipe, folder)
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _export(options: argparse.Namespace) -> int:
    folder = RunFolder(options.run)
    recipe = folder.read_recipe(tuple(options.overrides))
    check_recipe(recipe)
    command = _rank_command("moe_recipes.train.export_run", folder, recipe, cpu=options.cpu)
    if started_rank(os.environ, recipe.parallel.num_ranks) is not None:
        sys.stdout.flush()
        os.execv(sys.executable, command)
    return _run_here(command, recipe, folder, options, uses_status=False)


def _rank_command(module: str, folder: RunFolder, recipe: Recipe, *, cpu: bool) -> list[str]:
    """What every rank runs. The recipe travels along, so that no rank waits for recipe.json to appear."""
    words = [sys.executable, "-m", module, str(folder.path), "--recipe-json", json.dumps(recipe_to_dict(recipe))]
    return [*words, "--cpu"] if cpu else words


def _run_here(
    command: list[str], recipe: Recipe, folder: RunFolder, options: argparse.Namespace, *, uses_status: bool
) -> int:
    terminal = sys.stderr.buffer if options.json else None
    code, cause = run_ranks(
        command, num_ranks=recipe.parallel.num_ranks, folder=folder, uses_status=uses_status, terminal=terminal
    )
    if options.json:
        answer = {"run": str(folder.path), "exit_code": code, "status": folder.read_status()}
        print(json.dumps(answer if code == EXIT_OK else {"error": cause, **answer}))
    return code


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


if __name__ == "__main__":
    sys.exit(main())
