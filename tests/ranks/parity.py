"""One training step in one process of plain Transformers, and the same step through the trainer on any layout.

The reference runs every document alone, in float32, with eager experts and eager attention, ``F.cross_entropy`` and
``torch.optim.AdamW``; nothing of this package takes part. Both start from one folder of boosted random weights:
with a family's own initial values whole experts could be left out and the loss would hardly move.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moe_recipes.config.recipe import Data, Kernels, Model, Optim, Parallel, Recipe, Train
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.loader import IGNORE, Batch
from moe_recipes.runtime.world import World
from moe_recipes.train.run import Run, setup
from tests.tiny_models import tiny_config

SEQ_LEN = 32
NUM_ROWS = 16
NUM_MICROBATCHES = 2
UNPACKED = ("nemotron_h", "gpt_oss")
"""Families whose rows hold one document each here."""

EAGER_ATTENTION = ("gpt_oss", "gemma2")
"""Families for which Transformers has no scaled_dot_product_attention."""

LR, EPS, DECAY, BETAS = 1e-2, 1e-3, 0.1, (0.9, 0.95)
"""Adam's first step is g / (|g| + eps): a small eps would turn the rounding noise of a near-zero gradient into a whole
step. With this one the step is a smooth function of the gradient."""

CLIP = 0.5
"""Far below the gradient norm of a boosted model, so that clipping is part of the step."""

TOLERANCE = 1e-5


def boost(model: nn.Module, *, seed: int = 0) -> None:
    """Values that make every part of the model matter, drawn in the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf == "dt_bias":
                tensor.copy_(torch.linspace(-9, 0, tensor.numel()))
            elif leaf == "A_log":
                tensor.copy_(torch.linspace(-3, 1, tensor.numel()))
            elif leaf == "D":
                tensor.copy_(0.1 + normal(tensor, 0.1))
            elif leaf == "e_score_correction_bias":
                tensor.copy_(normal(tensor, 0.1))
            elif name.endswith("embed_tokens.weight") or name.endswith("embeddings.weight"):
                tensor.copy_(normal(tensor, 1.0))
            elif "norm" in name.split(".")[-2] and tensor.ndim == 1:
                tensor.copy_(1 + normal(tensor, 0.2))
            elif isinstance(tensor, nn.Parameter) and (tensor.ndim == 1 or leaf.endswith("bias")):
                tensor.copy_(normal(tensor, 0.3))
            elif isinstance(tensor, nn.Parameter):
                gain = 3.0 if "experts." in name or ".gate.weight" in name or ".router." in name else 1.0
                tensor.copy_(normal(tensor, gain / math.sqrt(tensor.shape[-1])))


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


@dataclass(frozen=True, kw_only=True)
class Document:
    """One training example inside a packed row."""

    row: int
    start: int
    input_ids: Tensor
    """int64 ``[n]``."""

    learned: Tensor
    """bool ``[n]``: tokens that carry loss; never the first, which nothing predicts."""


def documents(family: str, *, vocab_size: int = 256) -> list[Document]:
    """The step's documents with ragged label counts: rows 2, 3, 10 and 11 carry no loss, row 5 one label."""
    random = np.random.default_rng(0)
    found = []
    for row in range(NUM_ROWS):
        packed = family not in UNPACKED and row % 4 != 0
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


def honour_time_step_limit(model: nn.Module) -> None:
    """Mamba layers of Transformers clamp the time step at ``time_step_min`` and not at the config's limit."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(model.config.time_step_limit)


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
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "weights", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    honour_time_step_limit(model)
    model.train()
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
    weights: Path, *, ep_size: int = 1, dp_replicate_size: int = 1, checkpointing: str = "none", **train: Any
) -> Run:
    """The trainer's own set-up on these ranks, for handmade batches. ``train`` adds to that section of the recipe."""
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
        parallel=Parallel(fsdp_size=ranks // dp_replicate_size, ep_size=ep_size, dp_replicate_size=dp_replicate_size),
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
    if config_type not in UNPACKED:  # position ids reach the model, as with packed data
        run.recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, format="auto"))
    return run


def whole(tensor: Tensor) -> Tensor:
    """The global value of a parameter or gradient, a copy."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference; infinite where only the reference is zero."""
    error, norm = float((value.double() - reference.double()).norm()), float(reference.double().norm())
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def worst(values: dict[str, Tensor], references: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative error over all tensors, and over each expert of the expert weights alone."""
    assert values.keys() == references.keys()
    errors = []
    for name, reference in references.items():
        errors.append((relative_error(values[name], reference), name))
        if ".experts." in name:
            errors += [(relative_error(values[name][e], reference[e]), f"{name}[{e}]") for e in range(len(reference))]
    return max(errors)
