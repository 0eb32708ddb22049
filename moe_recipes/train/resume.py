"""Continuing a run: weights, optimizer, generators, and the step, from which data and rate follow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_recipes.checkpoint.folder import STEP_NAME, best_of, list_checkpoints
from moe_recipes.checkpoint.store import find_whole, load_checkpoint, step_of, verify_checkpoint
from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError, OtherRankError, exit_code_of
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.ckpt import BEST, EXPORT_VARIABLE, NEWEST
from moe_recipes.runtime.world import World, together
from moe_recipes.train.optim import prepare_state
from moe_recipes.train.run import Resumed, Run

logger = logging.getLogger("moe_recipes")


def find_checkpoint(folder: RunFolder, world: World) -> Path | None:
    """The checkpoint to export: what ``MOE_EXPORT_CHECKPOINT`` names, else the newest complete one, or None for a run
    that has saved none. One rank looks, for all.

    Raises:
        MissingInputError: status.json names a saved step, but the checkpoints are gone; or the named one is not there.
        CorruptCheckpointError: the named one is damaged, or all are.
    """
    name = os.environ.get(EXPORT_VARIABLE, NEWEST)
    if name != NEWEST:
        return _from_main(world, lambda: _named(folder.ckpt, name))
    path, damaged = newest_whole(folder, world, {})
    if damaged and world.is_main:
        logger.error("exporting %s: %s", path, "; ".join(damaged.values()))
    return path


def _named(ckpt_dir: Path, name: str) -> Path:
    if name == BEST:
        best = best_of(list_checkpoints(ckpt_dir))
        if not best:
            raise MissingInputError(f"{ckpt_dir}: no checkpoint has a validation loss; set train.validate_every_steps")
        return best[0].path
    path = ckpt_dir / name
    if not STEP_NAME.fullmatch(name) or not path.is_dir():
        raise MissingInputError(f"{path}: no such checkpoint; `moe-recipes ckpt ls` lists them")
    if problems := verify_checkpoint(path):
        raise CorruptCheckpointError(problems[0])
    return path


def newest_whole(folder: RunFolder, world: World, known: Mapping[Path, str]) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to resume from, and what is wrong with each that would have come before it. One rank looks.

    Args:
        known: checkpoints that a load found damaged, with the reason.
    Raises:
        MissingInputError: status.json names a saved step, but the checkpoints are gone.
        CorruptCheckpointError: all of them are damaged.
    """

    def look() -> tuple[Path | None, dict[Path, str]]:
        path, damaged = find_whole(folder.ckpt, known)
        saved = (folder.read_status() or {}).get("last_durable_step")
        if path is None and saved:
            raise MissingInputError(
                f"{folder.ckpt}: no checkpoint, though step {saved} was saved; put it back, or use another run_dir"
            )
        return path, damaged

    return _from_main(world, look)


def _from_main(world: World, look: Any) -> Any:
    found = [together(lambda: look() if world.is_main else None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def resume(run: Run) -> None:
    """Continue the newest whole checkpoint of the run folder, if there is one.

    A damaged one is passed over, be it by its sizes or by bytes that a load finds changed: in the log, as the event
    ``fell back``, and in the metrics of every later step of this start.

    Raises:
        RecipeError: the checkpoint is of another model, data set or optimizer.
        CorruptCheckpointError: all are damaged; or the newest is, and ``checkpoint.fall_back`` is false.
    """
    known: dict[Path, str] = {}
    while True:
        path, damaged = newest_whole(run.folder, run.world, known)
        if damaged and not run.recipe.checkpoint.fall_back:
            raise CorruptCheckpointError(
                f"{'; '.join(damaged.values())}, and checkpoint.fall_back is false; set it to true to go back to"
                f" {path}, or restore the damaged one"
            )
        if path is None:
            return
        start = time.perf_counter()
        reason, step = _load(run, path)
        if reason is None:
            break
        known[path] = reason
    seconds = time.perf_counter() - start
    run.step = run.last_durable_step = step
    run.resumed = Resumed(path=path, seconds=seconds, damaged=tuple(damaged.values()))
    if run.world.is_main:
        _say(run, run.resumed, lost_from=max(map(step_of, damaged), default=None))


def _load(run: Run, path: Path) -> tuple[str | None, int]:
    """Fill the run from a checkpoint. ``(None, step)``; or what is damaged, on all ranks alike, and 0: then the run
    holds parts of it, and must be filled again.

    Raises:
        MoeRecipesError: it cannot be loaded for another reason, on any rank.
    """
    prepare_state(run.optimizer, step=step_of(path))
    generators, error, state = run.rank_tensors(), None, {}
    try:
        state = load_checkpoint(
            path,
            entries=run.entries(),
            rank_tensors=generators,
            identity=run.identity,
            rank=run.world.rank,
            num_ranks=run.world.size,
        )
    except Exception as caught:
        error = caught
    said: list[tuple[str, int] | None] = [None] * run.world.size
    dist.all_gather_object(said, None if error is None else (str(error), exit_code_of(error)))
    failed = [(rank, *what) for rank, what in enumerate(said) if what is not None]
    other = next((what for what in failed if what[2] != CorruptCheckpointError.exit_code), None)
    if other is not None:
        if error is not None and exit_code_of(error) != CorruptCheckpointError.exit_code:
            raise error
        raise OtherRankError(other[1], rank=other[0], exit_code=other[2])
    if failed:
        return f"rank {failed[0][0]}: {failed[0][1]}", 0
    if state["rank_tensors_loaded"]:
        run.restore_rank_tensors(generators)
    return None, int(state["step"])


def _say(run: Run, resumed: Resumed, *, lost_from: int | None) -> None:
    """In the log and in events.jsonl, rank 0 alone."""
    if resumed.damaged:
        logger.error(
            "moe-recipes: DAMAGED CHECKPOINT: %s; going back from step %s to step %d, to train the rest again",
            "; ".join(resumed.damaged),
            lost_from,
            run.step,
        )
        run.folder.append_event("fell back", step=run.step, from_step=lost_from, reasons=list(resumed.damaged))
    num_bytes = sum(item.stat().st_size for item in resumed.path.iterdir() if item.suffix == ".safetensors")
    run.folder.append_event(
        "resume", step=run.step, path=str(resumed.path), seconds=round(resumed.seconds, 3), bytes=num_bytes
    )
    rate = num_bytes / 1e9 / max(resumed.seconds, 1e-9)
    logger.info(
        "continuing %s after step %d; loaded in %.1f s, %.2f GB/s", resumed.path, run.step, resumed.seconds, rate
    )
