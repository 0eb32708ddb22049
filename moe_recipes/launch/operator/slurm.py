"""What Slurm says about a job, asked once and briefly: an operator is answered while the scheduler is away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_recipes.config.errors import MoeRecipesError
from moe_recipes.launch.slurm.commands import run_slurm

TIMEOUT_S = 5.0


class JobState(NamedTuple):
    """A job as the scheduler sees it."""

    state: str
    nodes: str
    reason: str


def ask(words: Sequence[str]) -> tuple[int | None, str]:
    """Exit code and whole output of a Slurm command; the code is None where it is missing or did not answer."""
    try:
        done = run_slurm(words, timeout_s=TIMEOUT_S)
    except MoeRecipesError as error:
        return None, f"{error}\n"
    return done.returncode, done.stdout + done.stderr


def job_state(job: str) -> JobState | None:
    """The job in squeue, or None where it has ended, is unknown, or Slurm does not answer."""
    code, output = ask(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%N|%r"])
    parts = output.splitlines()[0].split("|") if code == 0 and output.strip() else []
    return JobState(*parts) if len(parts) == 3 else None
