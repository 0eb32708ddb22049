"""The verb ``ckpt``: list, verify, pin, prune, compare and export the checkpoints of a run.

What reads a checkpoint runs in a process of its own, ``python -m moe_recipes.checkpoint``; only ``diff`` and ``export``
load torch there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from moe_recipes.config.errors import MissingInputError, RecipeError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch import export
from moe_recipes.launch.arguments import add_cpu, add_json, add_overrides
from moe_recipes.launch.operator.facts import RunFacts
from moe_recipes.launch.operator.find import find_run
from moe_recipes.launch.rehearse import run_module

EXPORT_VARIABLE = "MOE_EXPORT_CHECKPOINT"
"""Name of the checkpoint that an export takes in place of the newest one."""

NEWEST, BEST = "latest", "best"
CHECKPOINT_NAME = re.compile(rf"step-\d{{8,}}|{NEWEST}|{BEST}")


class Target(NamedTuple):
    """Which checkpoints are meant."""

    ckpt_dir: Path
    name: str | None
    """``step-00000200``, ``latest`` or ``best``; None where only the run was named."""

    run: RunFolder | None
    """None for a checkpoint that was copied out of its run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="step, state, size, age of each checkpoint")
    verify = actions.add_parser("verify", help="find what is damaged; names file and tensor; exit code 74")
    prune = actions.add_parser("prune", help="say what the recipe's rules let go; delete it with --yes")
    pin = actions.add_parser("pin", help="keep a checkpoint from being pruned")
    diff = actions.add_parser("diff", help="tensors of two checkpoints that differ, and by how much")
    exporting = actions.add_parser("export", help="write RUN/export from a checkpoint")
    for action in (listing, verify, prune, pin, diff, exporting):
        action.add_argument("target", metavar="RUN[/CHECKPOINT]", help="a run, or RUN/step-00000200, /latest, /best")
        action.add_argument("--runs", metavar="DIR", help="where runs live; as for the verb status")
        add_json(action)
    verify.add_argument("--hash", action="store_true", help="read every byte, not the sizes alone")
    prune.add_argument("--keep-last", type=int, metavar="N", help="in place of the recipe's checkpoint.keep_last")
    prune.add_argument("--keep-best", type=int, metavar="N", help="in place of the recipe's checkpoint.keep_best")
    prune.add_argument("--yes", action="store_true", help="delete")
    pin.add_argument("--undo", action="store_true", help="let it be pruned again")
    diff.add_argument("other", metavar="RUN[/CHECKPOINT]", help="the checkpoint to compare with")
    add_cpu(exporting)
    add_overrides(exporting)


def run(options: argparse.Namespace) -> int:
    target = resolve(options.target, options.runs)
    if options.action == "export":
        return _export(options, target)
    asked = {"action": options.action, **_place(target), "json": options.json}
    for name in ("hash", "yes", "undo"):
        asked[name] = getattr(options, name, False)
    if options.action == "prune":
        asked |= _rules(options, target)
    if options.action == "diff":
        asked["other"] = _place(resolve(options.other, options.runs))
    return run_module(["moe_recipes.checkpoint", json.dumps(asked)])


def resolve(word: str, runs: str | None) -> Target:
    """The checkpoints that ``word`` names: a job or run as for ``status``, with ``/CHECKPOINT`` behind it or without.

    Raises:
        MissingInputError: no such run.
    """
    path = Path(word)
    name = path.name if CHECKPOINT_NAME.fullmatch(path.name) else None
    if name is not None:
        path = path.parent
    if path.name == "ckpt":
        path = path.parent
    try:
        run_folder = find_run(str(path), runs).folder
    except MissingInputError:
        if name is None or not Path(word).is_dir():
            raise
        return Target(Path(word).absolute().parent, name, None)
    return Target(run_folder.ckpt, name, run_folder)


def _place(target: Target) -> dict[str, str | None]:
    return {"ckpt_dir": str(target.ckpt_dir), "name": target.name}


def _rules(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """What a prune must keep: by the recipe, or as it was asked for; and what a running job resumed from.

    Raises:
        RecipeError: a single checkpoint was named, or a number is out of range.
    """
    if target.run is None or target.name is not None:
        raise RecipeError(f"{options.target}: prune takes a run; to keep one checkpoint, pin it")
    facts = RunFacts(target.run)
    section = facts.recipe["checkpoint"]
    keep_last = section["keep_last"] if options.keep_last is None else options.keep_last
    keep_best = section["keep_best"] if options.keep_best is None else options.keep_best
    if keep_last < 1 or keep_best < 0:
        raise RecipeError(f"--keep-last={keep_last} must be at least 1, --keep-best={keep_best} at least 0")
    resumed = [event["step"] for event in facts.events if event.get("event") == "resume"]
    return {"keep_last": keep_last, "keep_best": keep_best, "resumed": resumed[-1:] if not facts.is_over else []}


def _export(options: argparse.Namespace, target: Target) -> int:
    if target.run is None:
        raise RecipeError(f"{options.target}: not in the folder of a run, whose recipe an export needs")
    options.run = str(target.run.path)
    if target.name is not None:
        os.environ[EXPORT_VARIABLE] = target.name
    return export.run(options)
