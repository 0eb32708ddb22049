"""Which run an operator means: a folder, the name of a run, or the number of a Slurm job."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_recipes.config.errors import MissingInputError, MoeRecipesError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.arguments import CODE_DIR, DEFAULT_CLUSTER, add_json
from moe_recipes.launch.operator.slurm import job_state
from moe_recipes.launch.slurm.job_index import run_of_job

JOB = re.compile(r"\d+(?:[_+.]\w+)*")


@dataclass(frozen=True)
class Found:
    """The run that was asked for."""

    folder: RunFolder
    job: str | None
    """The job by which it was named; None where it was named by its folder."""


def add_target(parser: argparse.ArgumentParser) -> None:
    """``JOB|RUN``, ``--runs`` and ``--json``."""
    parser.add_argument("run", metavar="JOB|RUN", help="a Slurm job id, the folder of a run, or its name in --runs")
    parser.add_argument("--runs", metavar="DIR", help="where runs live; paths.runs of the cluster file, and runs/")
    add_json(parser)


def find_run(word: str, runs: str | None = None) -> Found:
    """The run that ``word`` names. A word of digits is a job; write ``./123`` for a folder of that name.

    Raises:
        MissingInputError: no such job or run; says where it was looked for.
    """
    places = [Path(runs).expanduser()] if runs else runs_folders()
    looked = ", ".join(str(place) for place in places)
    if JOB.fullmatch(word):
        job = re.split(r"[_+.]", word)[0]
        for place in places:
            if (path := run_of_job(place, job)) is not None:
                if is_run(path):
                    return Found(RunFolder(path), job)
                raise MissingInputError(_why_no_run(job, path))
        raise MissingInputError(f"no job {job} in {looked}; give the folder of the run, or --runs DIR")
    if not word:
        raise MissingInputError("JOB|RUN is empty; give a job's number, the folder of a run, or its name")
    for path in (Path(word).expanduser(), *(place / word for place in places)):
        if is_run(path):
            return Found(RunFolder(path), None)
    if Path(word).expanduser().is_dir():
        raise MissingInputError(f"{word} is not the folder of a run: it has no recipe.json")
    known = [path.name for place in places if place.is_dir() for path in place.iterdir() if is_run(path)]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; give the folder of the run, or --runs DIR"
    raise MissingInputError(f"no run {word!r}, neither as a folder nor in {looked}{hint}")


def _why_no_run(job: str, path: Path) -> str:
    seen = job_state(job)
    if seen is not None and seen.state == "PENDING":
        reason = "" if seen.reason == "None" else f" ({seen.reason})"
        return f"job {job} has not started yet{reason}, and {path} holds no earlier start"
    return f"job {job} belongs to {path}, which is not the folder of a run: it has no recipe.json"


def is_run(path: Path) -> bool:
    return (path / "recipe.json").is_file()


def runs_folders() -> list[Path]:
    """``paths.runs`` of the cluster files that jobs from here and from this clone take, and ``runs`` of the working
    folder.

    A cluster file that cannot be read is no reason to answer nothing: then only ``runs`` is looked at.
    """
    places = []
    named = os.environ.get("MOE_CLUSTER")
    for file in [Path(named)] if named else [Path(DEFAULT_CLUSTER), CODE_DIR / DEFAULT_CLUSTER]:
        if file.is_file():
            from moe_recipes.config.cluster import load_cluster

            with suppress(MoeRecipesError):
                places.append(Path(load_cluster(file).paths.runs).expanduser())
    return [*dict.fromkeys(places), Path("runs")]
