"""The newest job spec of a run: which cluster file, and so which secrets and paths, its jobs use."""

from __future__ import annotations

from moe_recipes.config.errors import MoeRecipesError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.slurm.job_index import jobs_of_run
from moe_recipes.launch.slurm.spec import JobSpec, read_spec


def newest_spec(folder: RunFolder) -> JobSpec | None:
    """The spec of the run's newest job that can be read; None for a run without Slurm."""
    for job in reversed(jobs_of_run(folder)):
        try:
            return read_spec(folder.path / "slurm" / job / "spec.json")
        except MoeRecipesError:
            continue
    return None
