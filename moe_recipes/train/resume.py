"""Saving a run and continuing it: weights, optimizer, generators, and the step, from which data and rate follow."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch.distributed as dist

from moe_recipes.checkpoint.store import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint, step_of
from moe_recipes.config.errors import MissingInputError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.runtime.world import World, agree, barrier, together
from moe_recipes.train.optim import prepare_state
from moe_recipes.train.run import Run

logger = logging.getLogger("moe_recipes")


def save(run: Run) -> None:
    """Write a checkpoint of the finished step. Every rank calls it; it returns when the checkpoint is durable."""
    if run.last_durable_step == run.step:
        return
    start = time.perf_counter()
    if run.world.is_main:
        run.folder.append_event("saving", step=run.step)  # no step will be reported until it is done
    path = save_checkpoint(
        run.folder.ckpt,
        run.step,
        entries=run.entries(),
        rank_tensors=run.rank_tensors(),
        state={"step": run.step},
        identity=run.identity,
        rank=run.world.rank,
        num_ranks=run.world.size,
        barrier=barrier,
        agree=agree,
    )
    run.last_durable_step = run.step
    if run.world.is_main:
        prune_checkpoints(run.folder.ckpt, keep_last=run.recipe.checkpoint.keep_last)
        seconds = time.perf_counter() - start
        run.folder.append_event("checkpoint", step=run.step, path=str(path), seconds=round(seconds, 3))
        run.folder.write_status("running", step=run.step, last_durable_step=run.step)
        logger.info("saved %s in %.1f s", path, seconds)


def find_checkpoint(folder: RunFolder, world: World) -> Path | None:
    """The newest complete checkpoint, or None for a run that has saved none. One rank looks, for all.

    Raises:
        MissingInputError: status.json names a saved step, but the checkpoints are gone.
    """

    def look() -> Path | None:
        if not world.is_main:
            return None
        path = latest_checkpoint(folder.ckpt)
        saved = (folder.read_status() or {}).get("last_durable_step")
        if path is None and saved:
            raise MissingInputError(
                f"{folder.ckpt}: no checkpoint, though step {saved} was saved; put it back, or use another run_dir"
            )
        return path

    found = [together(look)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def resume(run: Run) -> None:
    """Continue the newest complete checkpoint of the run folder, if there is one.

    Raises:
        RecipeError: the checkpoint is of another model, data set or optimizer.
        CorruptCheckpointError: it is damaged.
    """
    path = find_checkpoint(run.folder, run.world)
    if path is None:
        return
    prepare_state(run.optimizer, step=step_of(path))
    generators = run.rank_tensors()
    state = together(
        lambda: load_checkpoint(
            path,
            entries=run.entries(),
            rank_tensors=generators,
            identity=run.identity,
            rank=run.world.rank,
            num_ranks=run.world.size,
        )
    )
    if state["rank_tensors_loaded"]:
        run.restore_rank_tensors(generators)
    run.step = run.last_durable_step = state["step"]
    if run.world.is_main:
        run.folder.append_event("resume", step=run.step, path=str(path))
        logger.info("continuing %s after step %d", path, run.step)
