"""The verb ``wandb-sync``: send the steps of a run that trains offline to W&B, now and as often as wanted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_recipes.config.errors import EXIT_OK, RecipeError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.operator.children import run_module
from moe_recipes.launch.operator.facts import RunFacts
from moe_recipes.launch.operator.find import add_target, find_run
from moe_recipes.launch.operator.job_spec import newest_spec
from moe_recipes.launch.secrets import read_secrets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "--secrets", metavar="FILE", help="file with WANDB_API_KEY; the one of the run's cluster file if not given"
    )


def run(options: argparse.Namespace) -> int:
    folder = find_run(options.run, options.runs).folder
    _check_not_online(folder)
    spec = newest_spec(folder)
    place = options.secrets or (spec.cluster.paths.secrets if spec else None)
    environment = {"WANDB_MODE": "online"} | (read_secrets(place) if place else {})
    answer = json.loads(run_module("moe_recipes.train.wandb_replay", [str(folder.path)], environment).splitlines()[-1])
    if options.json:
        print(json.dumps({"run": str(folder.path), **answer}))
    else:
        print(f"{folder.path}: sent {answer['rows']} steps, W&B has step {answer['step']}: {answer['url']}")
    return EXIT_OK


def _check_not_online(folder: RunFolder) -> None:
    """Refuse a run whose trainer is writing to W&B itself: a second writer would put its own steps between."""
    facts = RunFacts(folder)
    if facts.is_over:
        return
    newest = max(_wandb_runs(folder.path / "wandb"), key=lambda item: item.stat().st_mtime, default=None)
    if newest is not None and newest.name.startswith("run-"):
        raise RecipeError(f"{folder.path}: is online, its trainer sends to W&B itself; nothing to send")


def _wandb_runs(place: Path) -> list[Path]:
    return [item for pattern in ("run-*", "offline-run-*") for item in place.glob(pattern) if item.is_dir()]
