"""Export of a run: the Hugging Face folder, and a probe by which anyone can check it.

``python -m moe_recipes.train.export_run RUN_DIR --recipe-json JSON`` exports the newest checkpoint of a run; the
trainer calls ``export_run`` after its last step.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from moe_recipes.checkpoint.store import load_checkpoint
from moe_recipes.config.errors import MissingInputError, NotFiniteError
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.build import read_source
from moe_recipes.models.check_export import PROBE
from moe_recipes.models.exporting.export import ExportReport, export_model
from moe_recipes.models.exporting.reload import UNCERTIFIED, certificate
from moe_recipes.runtime.files import replace_durably
from moe_recipes.runtime.sharding import local_tensor, reshard
from moe_recipes.runtime.versions import check_versions
from moe_recipes.runtime.world import World, agree, barrier, join_world, sum_over_ranks, together
from moe_recipes.train.process import run_rank
from moe_recipes.train.resume import find_checkpoint
from moe_recipes.train.run import WEIGHTS, Trained, make_model, model_entries, model_identity

logger = logging.getLogger("moe_recipes")
PROMPTS, PROMPT_TOKENS = 4, 32


def check_weights(run: Trained) -> None:
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


def _refuse(run: Trained, found: int, what: str) -> None:
    if sum_over_ranks(found)[0]:
        raise NotFiniteError(
            f"step {run.step}: {what} are not finite, so nothing was exported;"
            f" lower optim.lr, or go back to an earlier checkpoint in {run.folder.ckpt}"
        )


@torch.no_grad()
def write_probe(run: Trained) -> None:
    """Keep the trained model's own logits of fixed rows of tokens in ``RUN/export_probe.safetensors``.

    Raises:
        NotFiniteError: on all ranks, if a logit is not finite.
    """
    run.model.eval()
    ids = torch.arange(PROMPTS * PROMPT_TOKENS).mul(7919).remainder(run.source.vocab_size).view(PROMPTS, PROMPT_TOKENS)
    logits = run.model(input_ids=ids.to(run.world.device), use_cache=False).logits
    reshard(run.model)
    _refuse(run, int(not logits.isfinite().all()), "the trained model's logits")
    if run.world.is_main:
        tensors = {"input_ids": ids, "logits": logits.float().cpu().contiguous()}
        replace_durably(run.folder.path / PROBE, to_bytes(tensors, metadata={"dtype": run.recipe.model.dtype}))


def export_run(run: Trained, *, reload: bool | None = None) -> ExportReport:
    """Write ``RUN/export`` and the probe of a model that has its own forward. Every rank calls it.

    Args:
        reload: load the export in plain Transformers and in the serving engines that are installed before it takes its
            place; the recipe's ``checkpoint.reload_export`` if not given.
    Raises:
        NotFiniteError: weights that are not finite, or an export that is not the trained model.
        CannotWriteError, CorruptCheckpointError, RecipeError: see ``export_model``.
    """
    recipe = run.recipe
    if run.world.is_main:
        run.folder.append_event("exporting", step=run.step)
    check_weights(run)
    write_probe(run)
    tokenizer = Path(recipe.model.tokenizer) if recipe.model.tokenizer else None
    reload = recipe.checkpoint.reload_export if reload is None else reload
    report = export_model(
        run.model,
        run.folder.export,
        source_dir=run.source.folder,
        config_json=run.source.config_json,
        tokenizer_dir=tokenizer if tokenizer and tokenizer.is_dir() else None,
        rank=run.world.rank,
        num_ranks=run.world.size,
        barrier=barrier,
        agree=agree,
        like_source=recipe.model.weights == "pretrained",
        certify=lambda export: certificate(export, run.folder.path) if reload else UNCERTIFIED,
    )
    if run.world.is_main:
        for line in report_lines(report):
            logger.info("%s", line)
        run.folder.append_event("export", step=run.step, path=str(run.folder.export))
    return report


def report_lines(report: ExportReport) -> list[str]:
    """What an export wrote and how it was checked, for people."""
    size = report.total_bytes / 2**30
    lines = [f"export: {report.num_keys:,} tensors, {size:,.3f} GiB, in {report.num_files} files -> {report.out_dir}"]
    lines.append(f"export: every byte read back; {report.num_experts:,} experts, no two of them equal")
    changes = [f"{count} tensors {kind}" for kind, count in report.cast.items()]
    changes += [f"{count} {kind} tensors dequantised" for kind, count in report.quantised.items()]
    changes += [f"{len(report.source_keys_left_out)} tensors left out"] if report.source_keys_left_out else []
    if changes:
        lines.append(f"export: as in the source: {', '.join(changes)}")
    engines, logits = report.certificate["engines"], report.certificate["logits"]
    if isinstance(logits, dict):
        logits = f"logits differ by {logits['largest_difference']:.1e} of the largest, KL {logits['mean_kl']:.1e} nats"
    checked = [f"{name} {'agrees' if isinstance(said, dict) else said}" for name, said in engines.items()]
    return [*lines, f"export: {'; '.join(checked)}", f"export: reloaded: {logits}"]


def load_weights(recipe: Recipe, folder: RunFolder, world: World) -> Trained:
    """The model of a run with the weights of its newest checkpoint. Needs neither its data nor its optimizer.

    Raises:
        MissingInputError: there is no checkpoint.
    """
    source = read_source(recipe)
    model = make_model(recipe, source)
    path = find_checkpoint(folder, world)
    if path is None:
        raise MissingInputError(f"{folder.ckpt}: no complete checkpoint to export; train the run first")
    state = together(
        lambda: load_checkpoint(
            path,
            entries=model_entries(model, rank=world.rank),
            rank_tensors={},
            identity=model_identity(recipe, source),
            rank=world.rank,
            num_ranks=world.size,
            part=WEIGHTS,
        )
    )
    return Trained(recipe=recipe, folder=folder, world=world, source=source, model=model, step=state["step"])


def _export(run_dir: Path, recipe_json: str, *, cpu: bool) -> None:
    recipe = recipe_from_dict(json.loads(recipe_json))
    check_versions()
    export_run(load_weights(recipe, RunFolder(run_dir), join_world(cpu=cpu)))


if __name__ == "__main__":
    run_rank(_export, uses_status=False)
