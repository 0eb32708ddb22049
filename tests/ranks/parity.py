"""One training step in one process of plain Transformers, and the same step through the trainer on any layout.

The reference runs every document alone, in float32, with eager experts and eager attention, ``F.cross_entropy`` and
``torch.optim.AdamW``; nothing of this package takes part. Both start from one folder of boosted random weights:
with a family's own initial values whole experts could be left out and the loss would hardly move.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from moe_recipes.config.recipe import Data, Kernels, Model, Optim, Parallel, Recipe, Train
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.loader import IGNORE, Batch
from moe_recipes.prove.compare import relative_error, whole, whole_gradients, worst
from moe_recipes.prove.examples import Document
from moe_recipes.prove.reference import honour_time_step_limit, load_plain
from moe_recipes.prove.weights import boost
from moe_recipes.runtime.world import World
from moe_recipes.train.run import Run, setup
from tests.tiny_models import tiny_config

__all__ = [
    "boost",
    "build_run",
    "documents",
    "honour_time_step_limit",
    "rank_batches",
    "relative_error",
    "save_weights",
    "whole",
    "whole_gradients",
    "worst",
    "write_reference",
]
"""What tests take from here, some of it the package's own."""

SEQ_LEN = 32
NUM_ROWS = 16
NUM_MICROBATCHES = 2
EAGER_ATTENTION = ("gpt_oss", "gemma2")
"""Families for which Transformers has no scaled_dot_product_attention."""

LR, EPS, DECAY, BETAS = 1e-2, 1e-3, 0.1, (0.9, 0.95)
"""Adam's first step is g / (|g| + eps): a small eps would turn the rounding noise of a near-zero gradient into a whole
step. With this one the step is a smooth function of the gradient."""

CLIP = 0.5
"""Far below the gradient norm of a boosted model, so that clipping is part of the step."""

TOLERANCE = 1e-5


def starve(model: nn.Module) -> None:
    """Make every token of a Qwen3-MoE model pick experts 0 and 1: only they like hidden dimension 0, which is large."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 6.0
        for layer, weight in zip(model.model.layers, (1.0, 4.0), strict=True):
            layer.self_attn.o_proj.weight[0] = 0.0  # nothing is added to that dimension on its way
            layer.mlp.experts.down_proj[:, 0] = 0.0
            layer.mlp.experts.down_proj.mul_(0.1)
            layer.post_attention_layernorm.weight[0] = weight
            layer.mlp.gate.weight.mul_(0.5)
            layer.mlp.gate.weight[:, 0] = -1.0
            layer.mlp.gate.weight[:2, 0] = 1.0


def save_weights(family: str, folder: Path) -> None:
    """Boosted weights of a tiny model as Transformers saves them. ``qwen3_moe_starved`` routes to two experts only."""
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config(family.removesuffix("_starved")), dtype=torch.float32
    )
    boost(model)
    if family.endswith("_starved"):
        starve(model)
    model.save_pretrained(folder)


def documents(family: str, *, vocab_size: int = 256) -> list[Document]:
    """The step's documents with ragged label counts: rows 2, 3, 10 and 11 carry no loss, row 5 one label."""
    random = np.random.default_rng(0)
    found = []
    for row in range(NUM_ROWS):
        packed = row % 4 != 0
        cuts = sorted(random.choice(np.arange(3, SEQ_LEN - 3), size=2, replace=False)) if packed else []
        for start, end in zip([0, *cuts], [*cuts, SEQ_LEN], strict=True):
            learned = torch.from_numpy(random.random(end - start) < random.random())
            learned[0] = False
            if row in (2, 3, 10, 11):
                learned[:] = False
            if row == 5:
                learned[:] = False
                learned[-1] = bool(end == SEQ_LEN)
            ids = torch.from_numpy(random.integers(0, vocab_size, end - start))
            found.append(Document(row=row, start=int(start), input_ids=ids, learned=learned))
    return found


@torch.no_grad()
def _reference_logits(model: nn.Module, documents: list[Document]) -> Tensor:
    logits = torch.zeros(NUM_ROWS, SEQ_LEN, model.config.vocab_size)
    for d in documents:
        out = model(input_ids=d.input_ids[None], use_cache=False).logits[0]
        logits[d.row, d.start : d.start + len(d.input_ids)] = out
    return logits


def write_reference(family: str, folder: Path) -> None:
    """Save the weights, and one step of plain Transformers with what came of it, to ``folder``."""
    save_weights(family, folder / "weights")
    model = load_plain(folder / "weights")
    examples = documents(family)
    num_labels = sum(int(d.learned.sum()) for d in examples)
    result: dict[str, Any] = {"logits": _reference_logits(model, examples), "num_labels": num_labels, "loss": 0.0}
    for d in examples:
        logits = model(input_ids=d.input_ids[None], use_cache=False).logits[0, :-1]
        labels = torch.where(d.learned, d.input_ids, IGNORE)[1:]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / num_labels
        loss.backward()
        result["loss"] += float(loss.detach())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    vectors = [p for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith("bias")]
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS).step()
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result |= {"gradients": gradients, "grad_norm": norm, "after": after}
    result |= {"buffers": dict(model.named_buffers()), "logits_after": _reference_logits(model, examples)}
    torch.save(result, folder / "reference.pt")


def rank_batches(family: str) -> list[Batch]:
    """This rank's microbatches: row ``m * 8 + rank * B + i`` of the step is row i of microbatch m."""
    ids = torch.zeros(NUM_ROWS, SEQ_LEN, dtype=torch.int64)
    positions, labels = ids.clone(), torch.full_like(ids, IGNORE)
    for d in documents(family):
        place = slice(d.start, d.start + len(d.input_ids))
        ids[d.row, place] = d.input_ids
        positions[d.row, place] = torch.arange(len(d.input_ids))
        labels[d.row, d.start : place.stop - 1] = torch.where(d.learned, d.input_ids, IGNORE)[1:]
    per_micro = NUM_ROWS // NUM_MICROBATCHES
    size = per_micro // dist.get_world_size()
    batches = []
    for micro in range(NUM_MICROBATCHES):
        first = micro * per_micro + dist.get_rank() * size
        rows = slice(first, first + size)
        batches.append(
            Batch(
                input_ids=ids[rows],
                position_ids=positions[rows],
                shift_labels=labels[rows],
                num_label_tokens=int((labels[rows] != IGNORE).sum()),
                num_tokens=size * SEQ_LEN,
                row_ids=tuple(range(first, first + size)),
            )
        )
    return batches


def build_run(
    weights: Path,
    *,
    ep_size: int = 1,
    dp_replicate_size: int = 1,
    checkpointing: str = "none",
    dispatch: dict[str, Any] | None = None,
    **train: Any,
) -> Run:
    """The trainer's own set-up on these ranks, for handmade batches. ``train`` and ``dispatch`` add to the recipe's
    sections ``train`` and ``parallel``."""
    ranks = dist.get_world_size()
    folder = RunFolder(tempfile.mkdtemp())
    config_type = transformers.AutoConfig.from_pretrained(weights).model_type
    recipe = Recipe(
        name="parity",
        model=Model(
            source=str(weights),
            dtype="float32",
            attn_implementation="eager" if config_type in EAGER_ATTENTION else "sdpa",
        ),
        parallel=Parallel(
            fsdp_size=ranks // dp_replicate_size,
            ep_size=ep_size,
            dp_replicate_size=dp_replicate_size,
            **(dispatch or {}),
        ),
        data=Data(seq_len=SEQ_LEN, format="random_tokens"),
        optim=Optim(lr=LR, eps=EPS, betas=BETAS, weight_decay=DECAY, schedule="constant", max_grad_norm=CLIP),
        train=Train(
            steps=4,
            micro_batch_size=NUM_ROWS // NUM_MICROBATCHES // ranks,
            grad_accum_steps=NUM_MICROBATCHES,
            activation_checkpointing=checkpointing,
            **train,
        ),
        kernels=Kernels(loss_chunk_tokens=24),
    )
    world = World(rank=dist.get_rank(), local_rank=0, size=ranks, device=torch.device("cpu"), host="test")
    run = setup(recipe, folder, world)
    # Position ids reach the model, as with packed data.
    run.recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, format="auto"))
    return run
