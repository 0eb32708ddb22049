"""Export of a run: the Hugging Face folder, and a probe by which anyone can check it.

``python -m moe_recipes.train.export_run RUN_DIR --recipe-json JSON`` exports the newest checkpoint of a run; the
trainer calls ``export_run`` after its last step.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_recipes.config.errors import MissingInputError, NotFiniteError
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.export import export_model
from moe_recipes.models.loss import remove_loss
from moe_recipes.runtime.sharding import local_tensor, reshard
from moe_recipes.runtime.world import agree, barrier, join_world, sum_over_ranks
from moe_recipes.train.process import run_rank
from moe_recipes.train.resume import resume
from moe_recipes.train.run import Run, setup

logger = logging.getLogger("moe_recipes")
PROBE = "export_probe.safetensors"
PROBE_TOKENS = 32


def check_weights(run: Run) -> None:
    """Refuse to publish weights that are not finite. Every rank calls it.

    Raises:
        NotFiniteError: on all ranks; the last step can spoil weights without a loss that would show it.
    """
    spoilt = 0
    for name, parameter in run.model.named_parameters():
        local = local_tensor(parameter.detach())
        # The largest element, NaN where there is one: reads the weights once and allocates nothing.
        if local.numel() and not torch.linalg.vector_norm(local, float("inf")).isfinite():
            logger.error("rank %d: %s is not finite", run.world.rank, name)
            spoilt += 1
    _refuse(run, spoilt, "weights")


def _refuse(run: Run, found: int, what: str) -> None:
    if sum_over_ranks(found)[0]:
        raise NotFiniteError(
            f"step {run.step}: {what} are not finite, so nothing was exported;"
            f" lower optim.lr, or go back to an earlier checkpoint in {run.folder.ckpt}"
        )


@torch.no_grad()
def write_probe(run: Run) -> None:
    """Keep the trained model's own logits of a fixed row of tokens in ``RUN/export_probe.safetensors``.

    Raises:
        NotFiniteError: on all ranks, if a logit is not finite.
    """
    run.model.eval()
    vocab_size = run.source.config["vocab_size"]
    ids = torch.arange(PROBE_TOKENS).mul(7919).remainder(vocab_size).unsqueeze(0)
    logits = run.model(input_ids=ids.to(run.world.device), use_cache=False).logits
    reshard(run.model)
    _refuse(run, int(not logits.isfinite().all()), "the trained model's logits")
    if run.world.is_main:
        tensors = {"input_ids": ids, "logits": logits.float().cpu().contiguous()}
        save_file(tensors, run.folder.path / PROBE, metadata={"dtype": run.recipe.model.dtype})


def export_run(run: Run) -> None:
    """Write ``RUN/export`` and the probe. Every rank calls it; the run cannot train afterwards."""
    recipe = run.recipe
    remove_loss(run.model)
    check_weights(run)
    write_probe(run)
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
