"""Steps of an export that succeed on all ranks or fail on all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moe_recipes.config.errors import CannotWriteError, InfrastructureError, MoeRecipesError
from moe_recipes.models.exporting.convert import gather_objects

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ExportRanks:
    """The ranks that write one folder."""

    out_dir: Path
    rank: int
    num_ranks: int
    barrier: Callable[[], None]
    agree: Callable[[bool], bool]

    @property
    def work_dir(self) -> Path:
        return self.out_dir.with_name(self.out_dir.name + ".tmp")

    def together(self, step: Callable[[], T], *, only_rank_0: bool = False) -> T | None:
        """Run ``step``; if it failed anywhere, remove the unfinished folder and raise on every rank."""
        result, error = None, None
        try:
            if self.rank == 0 or not only_rank_0:
                result = step()
        except Exception as caught:  # kept until all ranks know, so that none waits for this one
            error = caught
        if self.agree(error is None):
            return result
        failures = gather_objects(None if error is None else self._as_user_error(error), self.num_ranks)
        if self.rank == 0:
            shutil.rmtree(self.work_dir, ignore_errors=True)
        self.barrier()
        if error is not None and not isinstance(error, (OSError, MoeRecipesError)):
            raise error
        raise next(failure for failure in failures if failure is not None)

    def _as_user_error(self, error: Exception) -> MoeRecipesError:
        """What the ranks without the error raise too, so that all end with the same exit code."""
        if isinstance(error, MoeRecipesError):
            return error
        where = f"export to {self.out_dir}: rank {self.rank}"
        if isinstance(error, OSError):
            text = error.strerror or str(error)
            file = f": {error.filename}" if error.filename else ""
            return CannotWriteError(
                f"{where}: {text}{file}; the unfinished folder was removed: mend this, export again"
            )
        return InfrastructureError(f"{where} failed with {type(error).__name__}: {error}; its log has the traceback")
