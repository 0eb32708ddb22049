"""Saving a run: at once, or beside the training from a copy in host memory.

    train | copy | train ................................. | report | train
                 +-- write, agree, COMPLETE, latest, prune --+        a thread, with a process group of its own

Never two at a time: the next save waits for the last. ``latest`` moves where it always moves, after COMPLETE.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.checkpoint.manifest import VALIDATION_LOSS
from moe_recipes.checkpoint.staging import Staging, staging_bytes
from moe_recipes.checkpoint.store import prune_checkpoints, save_checkpoint
from moe_recipes.config.errors import CannotWriteError
from moe_recipes.plan.saves import save_interval_s
from moe_recipes.runtime.host_memory import free_bytes
from moe_recipes.runtime.world import agree, barrier
from moe_recipes.train.optim import prepare_state
from moe_recipes.train.run import Run

logger = logging.getLogger("moe_recipes")
FREE_SHARE = 0.9
"""Of the host's free memory that staging may take; the rest is for the page cache and the data loader."""

TOLERATED_FAILURES = 1
"""Saves beside the training that may fail one after another, as on a full disk that somebody is emptying."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A save that is being written."""

    step: int
    start: float
    blocking_s: float
    future: Future[tuple[Path, float]]
    """The folder, and the seconds from the copy until it was durable."""


class Saver:
    """All saves of one run on this rank. Every method is called by all ranks, at the same steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.flight: Flight | None = None
        self.failures = 0
        self.durable_at = time.monotonic()
        self.numbers: dict[str, Any] = {}
        self.staging = _staging(run) if run.recipe.checkpoint.asynchronous else None
        if self.staging is not None:
            self.group = dist.new_group(backend="gloo")
            self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    @property
    def has_landed(self) -> bool:
        """A save beside the training has ended on this rank, and has not been reported."""
        return self.flight is not None and self.flight.future.done()

    def save(self, *, wait: bool) -> None:
        """Save the finished step, once the last save has ended.

        Args:
            wait: return when the checkpoint is durable; else, where the recipe saves asynchronously, when it is copied.
        Raises:
            CannotWriteError: on all ranks; this save failed, or the last two beside the training.
        """
        run = self.run
        self.finish()
        if run.last_durable_step == run.step:
            return
        start, beside = time.perf_counter(), self.staging is not None and not wait
        if run.world.is_main:
            # After "saving" no step is reported until it is done; a copy takes no longer than a step.
            run.folder.append_event("staging" if beside else "saving", step=run.step)
        if self.staging is None or wait:
            path, seconds = self._write(
                start, run.step, run.entries(), run.rank_tensors(), self._state(), agree, barrier
            )
            self._landed(run.step, path, seconds=seconds, blocking_s=time.perf_counter() - start)
            return
        staged = self.staging.copy(run.entries())
        arguments = (start, run.step, staged, run.rank_tensors(), self._state(), self._agree, self._barrier)
        self.flight = Flight(
            step=run.step,
            start=start,
            blocking_s=time.perf_counter() - start,
            future=self.pool.submit(self._write, *arguments),
        )

    def finish(self) -> None:
        """Wait for the save beside the training, if there is one, and report it.

        Raises:
            CannotWriteError: on all ranks, if it is the second in a row that could not be written. What was written of
                it is removed; the first one is said and passed over.
        """
        flight, self.flight = self.flight, None
        if flight is None:
            return
        run, start = self.run, time.perf_counter()
        if run.world.is_main and not flight.future.done():
            run.folder.append_event("saving", step=flight.step)
        try:
            path, seconds = flight.future.result()
        except CannotWriteError as error:
            self.failures += 1
            if run.world.is_main:
                run.folder.append_event("save failed", step=flight.step, cause=str(error))
            if self.failures > TOLERATED_FAILURES:
                raise
            logger.error(
                "moe-recipes: step %d was NOT saved: %s; training goes on, the next one must", flight.step, error
            )
            return
        self.failures = 0
        waited_s = time.perf_counter() - start
        self._landed(flight.step, path, seconds=seconds, blocking_s=flight.blocking_s + waited_s)

    def drain(self) -> None:
        """Let the save beside the training end before this process does; its failure is logged, not raised."""
        try:
            self.finish()
        except Exception as error:
            logger.error("moe-recipes: the save under way was lost: %s", error)

    def record(self) -> dict[str, Any]:
        """What metrics.jsonl says of checkpoints in each step; the numbers of a save once, after it."""
        numbers, self.numbers = self.numbers, {}
        resumed = self.run.resumed
        damaged = {"damaged_checkpoints": len(resumed.damaged)} if resumed is not None and resumed.damaged else {}
        return {"since_durable_s": time.monotonic() - self.durable_at, **numbers, **damaged}

    def _state(self) -> dict[str, Any]:
        run = self.run
        state: dict[str, Any] = {"step": run.step}
        measured_at, loss = run.validation_loss
        if measured_at == run.step and math.isfinite(loss):
            state[VALIDATION_LOSS] = loss
        return state

    def _write(
        self,
        start: float,
        step: int,
        entries: Mapping[str, Entry],
        rank_tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        agree: Callable[[bool], bool],
        barrier: Callable[[], None],
    ) -> tuple[Path, float]:
        """Write, and only then prune; in the thread as well as at once. Touches no device."""
        run, section = self.run, self.run.recipe.checkpoint
        path = save_checkpoint(
            run.folder.ckpt,
            step,
            entries=entries,
            rank_tensors=rank_tensors,
            state=state,
            identity=run.identity,
            rank=run.world.rank,
            num_ranks=run.world.size,
            barrier=barrier,
            agree=agree,
        )
        seconds = time.perf_counter() - start
        if run.world.is_main:
            resumed = [run.resumed.path] if run.resumed is not None else []
            prune_checkpoints(
                run.folder.ckpt, keep_last=section.keep_last, keep_best=section.keep_best, protect=resumed
            )
        return path, seconds

    def _agree(self, ok: bool) -> bool:
        flag = torch.tensor(int(ok))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def _barrier(self) -> None:
        self._agree(True)

    def _landed(self, step: int, path: Path, *, seconds: float, blocking_s: float) -> None:
        """A save is durable: remember and report it."""
        run = self.run
        run.last_durable_step = step
        self.durable_at = time.monotonic()
        if not run.world.is_main:
            return
        num_bytes = sum(item.stat().st_size for item in path.iterdir() if item.suffix == ".safetensors")
        hours = run.recipe.checkpoint.mtbf_hours
        self.numbers = {
            "checkpoint_save_s": seconds,
            "checkpoint_blocking_s": blocking_s,
            "checkpoint_gb_per_s": num_bytes / 1e9 / max(seconds, 1e-9),
        }
        if hours is not None:
            self.numbers["checkpoint_interval_s"] = save_interval_s(blocking_s, mtbf_hours=hours)
        run.folder.append_event(
            "checkpoint",
            step=step,
            path=str(path),
            seconds=round(seconds, 3),
            blocking_s=round(blocking_s, 3),
            bytes=num_bytes,
        )
        run.folder.write_status("running", step=run.step, last_durable_step=step)
        rate = self.numbers["checkpoint_gb_per_s"]
        logger.info("saved %s in %.1f s, %.2f GB/s; training stood for %.1f s", path, seconds, rate, blocking_s)


def _staging(run: Run) -> Staging | None:
    """Host memory for the copies; None, and a line in the log, where a host of any rank has too little."""
    if run.step == 0:
        prepare_state(run.optimizer, step=0)  # torch's AdamW has its states only after a step; zeros are the same
    entries = run.entries()
    mine = (run.world.host, staging_bytes(entries), free_bytes())
    ranks: list[tuple[str, int, int] | None] = [None] * run.world.size
    dist.all_gather_object(ranks, mine)
    known = [one for one in ranks if one is not None]
    for host in sorted({name for name, _, _ in known}):
        wanted = sum(size for name, size, _ in known if name == host)
        free = min(free for name, _, free in known if name == host)
        if wanted > FREE_SHARE * free:
            if run.world.is_main:
                logger.warning(
                    "checkpoint.asynchronous: %s has %.1f GB free, copies of its ranks need %.1f GB: saves wait",
                    host,
                    free / 1e9,
                    wanted / 1e9,
                )
            return None
    if run.world.is_main:
        logger.info("checkpoint.asynchronous: %.3f GB of host memory a rank for copies", mine[1] / 1e9)
    return Staging(entries)


def save(run: Run) -> None:
    """Write a checkpoint of the finished step. Every rank calls it; it returns when the checkpoint is durable."""
    Saver(run).save(wait=True)
