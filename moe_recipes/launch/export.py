"""The verb ``export``: write RUN/export from the run's newest checkpoint."""

from __future__ import annotations

import argparse
import os
import sys

from moe_recipes.config.checks import check_recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.arguments import add_cpu, add_json, add_overrides, add_run
from moe_recipes.launch.train import rank_command, run_here, started_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_cpu(parser)
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    folder = RunFolder(options.run)
    recipe = folder.read_recipe(tuple(options.overrides))
    check_recipe(recipe)
    command = rank_command("moe_recipes.train.export_run", folder, recipe, cpu=options.cpu)
    if started_rank(os.environ, recipe.parallel.num_ranks) is not None:
        sys.stdout.flush()
        os.execv(sys.executable, command)
    return run_here(command, recipe, folder, options, uses_status=False)
