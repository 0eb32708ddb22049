"""The verbs ``stop`` and ``save``: make the file by which a run is asked to stop, or to save, at its next step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_recipes.config.errors import EXIT_OK, CannotWriteError, RecipeError
from moe_recipes.launch.operator.facts import RunFacts
from moe_recipes.launch.operator.find import add_target, find_run
from moe_recipes.launch.operator.slurm import job_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--undo", action="store_true", help="take the request back, if the run has not acted on it")


def run(options: argparse.Namespace) -> int:
    found = find_run(options.run, options.runs)
    facts = RunFacts(found.folder)
    switch = found.folder.stop_file if options.verb == "stop" else found.folder.save_file
    if options.undo:
        said = _take_back(switch)
    else:
        _check_running(facts, options.verb, found.job or facts.job)
        said = _ask(switch, options.verb, facts)
    print(json.dumps({"run": str(found.folder.path), "file": str(switch), "said": said}) if options.json else said)
    return EXIT_OK


def _check_running(facts: RunFacts, verb: str, job: str | None) -> None:
    """Refuse where no attempt is there to act: the file would be found by the next start, after its first step."""
    if not facts.is_over and facts.state != "not started":
        return
    place, state = facts.folder.path, facts.state
    seen = job_state(job) if job else None
    if seen is not None and seen.state == "PENDING":
        raise RecipeError(f"{place} waits for job {job} to start again; to end it, run: scancel {job}")
    if seen is None or seen.state != "RUNNING":
        raise RecipeError(f"{place} is not running (state: {state}); there is nothing to {verb}")


def _ask(switch: Path, verb: str, facts: RunFacts) -> str:
    try:
        switch.touch()
    except OSError as error:
        raise CannotWriteError(f"{switch}: cannot be written: {error.strerror}; run as the owner of the run") from error
    each = facts.steps.recent_s
    when = f"at the end of its step (a step takes {each:.1f} s)" if each else "after its first step"
    saves = facts.saves
    takes = f" in about {max(1, round(float(saves[-1].get('seconds') or 0)))} s" if saves else ""
    if verb == "save":
        return f"{switch}: the run saves{takes} {when} and goes on; it removes the file when the save is durable"
    return (
        f"{switch}: the run saves{takes} {when} and ends with exit code 0; it is not started again by itself,"
        f" the next start continues it"
    )


def _take_back(switch: Path) -> str:
    try:
        switch.unlink()
    except FileNotFoundError:
        return f"{switch}: is not there; nothing was asked, or the run has acted on it"
    except OSError as error:
        raise CannotWriteError(f"{switch}: cannot be removed: {error.strerror}") from error
    return f"{switch}: removed; nothing is asked of the run"
