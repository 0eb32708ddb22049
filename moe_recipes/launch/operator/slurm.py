"""What Slurm says about a job, asked once and briefly: an operator is answered while the scheduler is away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_recipes.config.errors import InfrastructureError, MoeRecipesError
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
    """The job in squeue; its state is ``UNKNOWN`` where Slurm does not answer. None where it has ended, is unknown, or
    this host has no squeue."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%N|%r"]
    try:
        done = run_slurm(words, timeout_s=TIMEOUT_S)
    except InfrastructureError:
        return JobState("UNKNOWN", "", "Slurm does not answer")
    except MoeRecipesError:
        return None
    parts = done.stdout.splitlines()[0].split("|") if done.returncode == 0 and done.stdout.strip() else []
    return JobState(*parts) if len(parts) == 3 else None


def may_be_there(job: str) -> bool:
    """Whether the job waits or runs; also where Slurm does not answer, since nothing says that it has ended."""
    code, output = ask(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
    return code is None or (bool(output.strip()) if code == 0 else "Invalid job id" not in output)
