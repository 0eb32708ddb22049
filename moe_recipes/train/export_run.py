"""Export of a run: the Hugging Face folder, and a probe by which anyone can check it.

``python -m moe_recipes.train.export_run RUN_DIR --recipe-json JSON`` exports the newest checkpoint of a run; the
trainer calls ``export_run`` after its last step.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_recipes.config.errors import MissingInputError
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.export import export_model
from moe_recipes.models.loss import remove_loss
from moe_recipes.runtime.sharding import reshard
from moe_recipes.runtime.world import agree, barrier, join_world
from moe_recipes.train.process import run_rank
from moe_recipes.train.resume import resume
from moe_recipes.train.run import Run, setup

PROBE = "export_probe.safetensors"
PROBE_TOKENS = 32


@torch.no_grad()
def write_probe(run: Run) -> None:
    """Keep the trained model's own logits of a fixed row of tokens in ``RUN/export_probe.safetensors``."""
    run.model.eval()
    vocab_size = run.source.config["vocab_size"]
    ids = torch.arange(PROBE_TOKENS).mul(7919).remainder(vocab_size).unsqueeze(0)
    logits = run.model(input_ids=ids.to(run.world.device), use_cache=False).logits
    reshard(run.model)
    if run.world.is_main:
        save_file({"input_ids": ids, "logits": logits.float().cpu().contiguous()}, run.folder.path / PROBE)


def export_run(run: Run) -> None:
    """Write ``RUN/export`` and the probe. Every rank calls it; the run cannot train afterwards."""
    recipe = run.recipe
    remove_loss(run.model)
    tokenizer = Path(recipe.model.tokenizer) if recipe.model.tokenizer else None
    export_model(
        run.model,
        run.folder.export,
        source_dir=run.source.folder,
        config_json=run.source.config_json,
        tokenizer_dir=tokenizer if tokenizer and tokenizer.is_dir() else None,
        rank=run.world.rank,
        num_ranks=run.world.size,
        barrier=barrier,
        agree=agree,
    )
    write_probe(run)
    if run.world.is_main:
        run.folder.append_event("export", step=run.step, path=str(run.folder.export))


def _export(run_dir: Path, recipe_json: str, *, cpu: bool) -> None:
    recipe = recipe_from_dict(json.loads(recipe_json))
    folder, world = RunFolder(run_dir), join_world(cpu=cpu)
    run = setup(recipe, folder, world)
    resume(run)
    if run.step == 0:
        raise MissingInputError(f"{folder.ckpt}: no complete checkpoint to export; train the run first")
    export_run(run)


if __name__ == "__main__":
    run_rank(_export)
