"""Where a job's run lives: ``RUNS/.jobs/JOB`` holds the path of the run folder, written when a job starts."""

from __future__ import annotations

import uuid
from pathlib import Path

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.config.run_folder import RunFolder

INDEX = ".jobs"


def note_job(runs: str | Path, job: str, run_dir: str | Path) -> None:
    """Note that ``job`` trains in ``run_dir``. Cheap, and harmless when said again: every start of a job says it.

    Raises:
        CannotWriteError: the index cannot be written.
    """
    index = Path(runs) / INDEX
    # `launch` and the job that it submitted may write at the same moment.
    entry, temporary = index / job, index / f".{job}-{uuid.uuid4().hex}"
    try:
        index.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{Path(run_dir).absolute()}\n")
        temporary.replace(entry)
    except OSError as error:
        raise CannotWriteError(
            f"{entry}: cannot be written: {error.strerror}; free space, or set another paths.runs"
        ) from error


def run_of_job(runs: str | Path, job: str) -> Path | None:
    """The run folder of ``job``, or None. A job that the index does not know is looked for in the run folders."""
    try:
        return Path((Path(runs) / INDEX / job).read_text().strip())
    except OSError:
        return next((folder.parents[1] for folder in sorted(Path(runs).glob(f"*/slurm/{job}"))), None)


def jobs_of_run(folder: RunFolder) -> list[str]:
    """Job ids that a run has folders of, oldest first."""
    names = [item.name for item in (folder.path / "slurm").glob("*") if item.name.isdigit() and item.is_dir()]
    return sorted(names, key=int)
