"""One rank of a training run: ``python -m moe_recipes.train RUN_DIR --recipe-json JSON``. The launcher starts it."""

from __future__ import annotations

import json
from pathlib import Path

from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.loss import remove_loss
from moe_recipes.runtime.stop import StopFlag
from moe_recipes.runtime.versions import check_versions
from moe_recipes.runtime.world import join_world
from moe_recipes.train.export_run import export_run
from moe_recipes.train.loop import train
from moe_recipes.train.process import run_rank
from moe_recipes.train.resume import resume
from moe_recipes.train.run import setup


def _train(run_dir: Path, recipe_json: str, *, cpu: bool) -> None:
    recipe, folder = recipe_from_dict(json.loads(recipe_json)), RunFolder(run_dir)
    check_versions()
    stop = StopFlag()
    world = join_world(cpu=cpu)
    if world.is_main:
        folder.write_status("starting")
    run = setup(recipe, folder, world)
    resume(run)
    state = train(run, stop)
    if state == "done" and recipe.checkpoint.export:
        remove_loss(run.model)
        export_run(run)
    if world.is_main:
        folder.write_status(state, step=run.step, last_durable_step=run.last_durable_step, exit_code=0)
        folder.append_event(state, step=run.step)


if __name__ == "__main__":
    run_rank(_train)
