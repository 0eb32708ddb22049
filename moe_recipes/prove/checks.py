"""One layout of the proof, on its ranks: the trainer's own set-up, step, checkpoint and export, each against the
reference. Every rank calls everything, as sharded tensors are made whole together."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.checkpoint.manifest import read_manifest
from moe_recipes.checkpoint.store import load_checkpoint
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.loader import Batch
from moe_recipes.models.loss import remove_loss
from moe_recipes.prove.compare import distances, relative_error, whole, whole_gradients
from moe_recipes.prove.examples import ROWS_PER_MICROBATCH, rank_batches
from moe_recipes.prove.isolation import document_isolation, forward, mtp_isolation
from moe_recipes.prove.mtp import block_keys, block_tensors, read_tensors
from moe_recipes.prove.reference import norm_of, reference_step
from moe_recipes.prove.task import CLIP_FACTOR, EPS, LR, NOISE_FLOOR, TOLERANCE, Check, Layout, Task, write_checks
from moe_recipes.runtime.safetensors_file import DTYPES
from moe_recipes.runtime.sharding import Rows
from moe_recipes.runtime.world import World, barrier, max_over_ranks
from moe_recipes.train import loop, saves
from moe_recipes.train.export_run import export_run
from moe_recipes.train.run import WEIGHTS, Run, setup

NAMES_SHOWN = 3
MTP_LOSS = "MTP loss"


def expected(reference: Mapping[str, Any], task: Task, layout: Layout) -> dict[str, Any]:
    """The reference's step as this layout deals its rows out: the load-balancing loss is of each rank's own rows."""
    coef, optim = task.recipe.train.router_aux_loss_coef, task.recipe.optim
    gradients: dict[str, Tensor] = dict(reference["gradients"])
    aux = reference["aux"].get(ROWS_PER_MICROBATCH // layout.num_ranks)
    if aux is not None:
        for name, gradient in aux["gradients"].items():
            gradients[name] = gradients.get(name, torch.zeros_like(gradient)) + coef * gradient
    norm = norm_of(gradients)
    clip = CLIP_FACTOR * norm if optim.max_grad_norm else 0.0
    step = reference_step(
        reference["weights"], gradients, clip=clip, lr=LR, eps=EPS,
        betas=(optim.betas[0], optim.betas[1]), weight_decay=optim.weight_decay,
    )  # fmt: skip
    after = {"weights": step["weights"] | reference["frozen"], "moments": step["moments"]}
    return {"gradients": gradients, "norm": norm, "clip": clip, "aux": aux["loss"] if aux else None, **after}


def _close(name: str, errors: Sequence[tuple[float, str]], what: str) -> Check:
    """Passed if the first of ``errors``, the largest, is small; otherwise the first few are named."""
    error = errors[0][0]
    passed = error <= TOLERANCE
    large = [where for value, where in errors if value > TOLERANCE]
    found = ", ".join(large[:NAMES_SHOWN]) + (f" and {len(large) - NAMES_SHOWN} more" if large[NAMES_SHOWN:] else "")
    return Check(name=name, passed=passed, value=error, limit=TOLERANCE, found=what if passed else found)


def _number(name: str, value: float, reference: float) -> Check:
    error = abs(value / reference - 1) if reference else abs(value)
    error = error if math.isfinite(error) else math.inf
    passed = error <= TOLERANCE
    return Check(
        name=name, passed=passed, value=error, limit=TOLERANCE, found=f"{value:.7g}, reference {reference:.7g}"
    )


class _Watched:
    """The run's clip, which also keeps the whole gradients that it measured: some optimizers never scale them."""

    def __init__(self, run: Run) -> None:
        self.run, self.clip = run, run.clip
        self.gradients: dict[str, Tensor] = {}

    def norm(self) -> Tensor:
        self.gradients = whole_gradients(self.run.model)
        return self.clip.norm()

    def scale(self, norm: float, optimizer: torch.optim.Optimizer) -> None:
        self.clip.scale(norm, optimizer)


def prove_layout(task: Task, layout: Layout) -> None:
    """Compare one layout with the reference and leave the findings in ``task.checks(layout)``. On every rank."""
    reference = torch.load(task.reference)
    want = expected(reference, task, layout)
    recipe = task.run_recipe(layout, clip=want["clip"])
    folder = RunFolder(task.folder / f"run-{layout.num_ranks}")
    if dist.get_rank() == 0:
        folder.path.mkdir(parents=True)
    barrier()
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank=rank, local_rank=0, size=size, device=torch.device("cpu"), host="prove")
    run = setup(recipe, folder, world)
    # Position ids reach the model only with data that was packed; set-up has drawn random tokens instead.
    run.recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, format="auto"))
    batches = rank_batches(task.documents(), rank=rank, num_ranks=size)

    trained = run.model.forward
    remove_loss(run.model)
    found = [_logits(run, batches, reference["logits"]), document_isolation(run, batches[0], task)]
    run.model.forward = trained
    run.model.train()
    if run.mtp_coef:
        found.append(mtp_isolation(run, batches[0], task))
    found += _step(run, batches, reference, want)
    remove_loss(run.model)
    found += _checkpoint(run, want, reference["buffers"])
    found += _export(run, want["weights"], reference["buffers"], task.weights)
    write_checks(task.checks(layout), found)


def _logits(run: Run, batches: list[Batch], reference_RSV: Tensor) -> Check:
    errors = [relative_error(forward(run, b, b.input_ids), reference_RSV[list(b.row_ids)]) for b in batches]
    worst_row = max_over_ranks(max(errors))[0]
    return _close("logits", [(worst_row, "the model's logits before the step")], "every row of every rank")


def _step(run: Run, batches: list[Batch], reference: Mapping[str, Any], want: Mapping[str, Any]) -> list[Check]:
    """One optimizer step of the trainer: loss, gradients, norm, weights, buffers, tokens of every expert."""
    watched = _Watched(run)
    run.clip = watched  # type: ignore[assignment]
    stats = loop.train_step(run, batches)
    after = {name: whole(parameter) for name, parameter in run.model.named_parameters()}
    floor = NOISE_FLOOR * want["norm"]
    found = [
        _number("loss", stats.loss, reference["loss"]),
        *([_number("load-balancing loss", stats.aux_loss, want["aux"])] if want["aux"] is not None else []),
        *([_number(MTP_LOSS, stats.mtp_loss, reference["mtp"])] if "mtp" in reference else []),
        _number("gradient norm", stats.grad_norm, want["norm"]),
        _close(
            "gradients",
            distances(watched.gradients, want["gradients"], floor=floor),
            f"{len(want['gradients'])} tensors, and each expert",
        ),
        _close("weights after the step", distances(after, want["weights"]), f"{len(after)} tensors, and each expert"),
    ]
    frozen = {name: buffer for name, buffer in run.model.named_buffers() if name in reference["buffers"]}
    moved = [name for name, buffer in frozen.items() if not torch.equal(whole(buffer), reference["buffers"][name])]
    found.append(
        Check(
            name="frozen buffers", passed=not moved, value=None, limit=None,
            found=f"{moved[0]} moved" if moved else f"{len(frozen)} are bit for bit as they were",
        )
    )  # fmt: skip
    return [*found, _tokens(run, stats.expert_counts, reference["counts"])]


def _tokens(run: Run, counts_LE: Tensor | None, reference: list[Tensor]) -> Check:
    """Exact: every token of the step reached the experts that the reference chose."""
    rows = [] if counts_LE is None or run.load is None else list(zip(run.load.layers, counts_LE, strict=True))
    wrong = [layer for (layer, row), want in zip(rows, reference, strict=False) if not torch.equal(row, want)]
    passed = not wrong and len(rows) == len(reference)
    busiest = max((int(row.max()) for _, row in rows), default=0)
    said = f"{len(rows)} layers; the busiest expert got {busiest} tokens"
    if not passed:
        said = f"layer {wrong[0]} sent other tokens to its experts" if wrong else "other layers have experts"
    return Check(name="tokens of every expert", passed=passed, value=None, limit=None, found=said)


def _checkpoint(run: Run, want: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> list[Check]:
    """Save as the trainer does, and read all of it back as one rank: weights, buffers, both moments."""
    saves.save(run)
    path = run.folder.ckpt / f"step-{run.step:08d}"
    saved = {name: torch.zeros(t.shape, dtype=DTYPES[t.dtype]) for name, t in read_manifest(path).tensors.items()}
    entries = {
        name: Entry(tensor=tensor, rows=Rows(start=0, count=tensor.shape[0] if tensor.ndim else 1,
                                             shape=tuple(tensor.shape), primary=True))
        for name, tensor in saved.items()
    }  # fmt: skip
    load_checkpoint(path, entries=entries, rank_tensors={}, identity=run.identity, rank=0, num_ranks=1, part="")
    persistent = run.model.state_dict().keys()
    wanted = {f"{WEIGHTS}{name}": tensor for name, tensor in want["weights"].items()}
    wanted |= {f"{WEIGHTS}{name}": tensor for name, tensor in buffers.items() if name in persistent}
    for moment, tensors in want["moments"].items():
        wanted |= {f"optim.{moment}.{name}": tensor for name, tensor in tensors.items()}
    floor = NOISE_FLOOR * want["norm"]
    error = distances(saved, wanted, floor=floor)
    return [_close("saved tensors", error, f"{len(saved)} read back by one rank")]


def _export(run: Run, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], source: Path) -> list[Check]:
    """Export as the trainer does: the source's keys, shapes and dtypes, and plain Transformers loads these weights."""
    export_run(run, reload=False)  # it is loaded below
    have, wanted = _headers(run.folder.export), _headers(source)
    differ = sorted(key for key in have.keys() | wanted.keys() if have.get(key) != wanted.get(key))
    keys = Check(
        name="exported keys", passed=not differ, value=None, limit=None,
        found=f"{differ[0]}: {have.get(differ[0])}, in the source {wanted.get(differ[0])}" if differ
        else f"{len(have)} keys, shapes and dtypes of the source",
    )  # fmt: skip
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.folder.export, dtype=torch.float32, output_loading_info=True
    )
    config, written = model.config.to_dict(), read_tensors(run.folder.export)
    unknown = info["unexpected_keys"] - block_keys(config, info["unexpected_keys"]).keys()
    missing = sorted(map(str, [*info["missing_keys"], *unknown, *info["mismatched_keys"]]))
    blocks, copies = block_tensors(config, written)
    loaded = dict(model.named_parameters()) | {name: t for name, t in blocks.items() if name in weights}
    errors = [(math.inf, key) for key in missing] or distances(loaded, weights)
    errors += [(math.inf, key) for key, own in copies.items() if not torch.equal(written[key], written[own])]
    errors.sort(reverse=True)
    barrier()
    shutil.rmtree(run.folder.export, ignore_errors=True)
    return [keys, _close("exported weights", errors, f"{len(weights)} tensors, loaded by plain Transformers")]


def _headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                piece = file.get_slice(key)
                found[key] = (tuple(piece.get_shape()), str(piece.get_dtype()))
    return found
