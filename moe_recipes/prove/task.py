"""What the processes of one proof share: the small model's folder, the recipe, the documents, and the findings."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_recipes.config.recipe import Model, Parallel, Recipe
from moe_recipes.families import PROOF_TOLERANCE
from moe_recipes.prove.examples import NUM_MICROBATCHES, ROWS_PER_MICROBATCH, Document, make_documents

LR, EPS = 1e-2, 1e-3
"""Adam's first step is g / (|g| + eps): a small eps would turn the rounding noise of a near-zero gradient into a whole
step. With this one the step is a smooth function of the gradient."""

CLIP_FACTOR = 0.25
"""The clip's limit over the true norm, so that clipping is part of the step."""

TOLERANCE = PROOF_TOLERANCE

NOISE_FLOOR = 1e-6
"""Over the global norm: a gradient below it is rounding noise, such as that of a bias which a softmax cancels."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One number of ranks, and how they share the model."""

    num_ranks: int
    ep_size: int
    dp_replicate_size: int = 1

    @property
    def efsdp_size(self) -> int:
        return self.num_ranks // self.dp_replicate_size // self.ep_size

    def __str__(self) -> str:
        return (
            f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}: ep {self.ep_size} x efsdp {self.efsdp_size} x"
            f" dp_replicate {self.dp_replicate_size}"
        )


def layouts(*, expert_parallel: bool, replicas: bool) -> list[Layout]:
    """1, 2, 4 and 8 ranks: whole experts, experts that FSDP2 cuts too, and replicas where the recipe has some."""
    ep = (1, 2, 2, 2 if replicas else 4) if expert_parallel else (1, 1, 1, 1)
    return [
        Layout(num_ranks=ranks, ep_size=ep_size, dp_replicate_size=2 if replicas and ranks == 8 else 1)
        for ranks, ep_size in zip((1, 2, 4, 8), ep, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the reference."""

    name: str
    passed: bool
    value: float | None
    """The error, where it is one; infinite for what is missing."""

    limit: float | None
    found: str
    """What differs, or what was compared."""

    def to_json(self) -> dict[str, Any]:
        value = None if self.value is None or not math.isfinite(self.value) else self.value
        return {**dataclasses.asdict(self), "value": value}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One proof on disk: ``weights/`` (the small model), ``reference.pt``, and a folder for each layout's run."""

    folder: Path
    recipe: Recipe
    packed: bool

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.pt"

    def checks(self, layout: Layout) -> Path:
        return self.folder / f"checks-{layout.num_ranks}.json"

    def documents(self) -> list[Document]:
        config = json.loads((self.weights / "config.json").read_bytes())
        vocab_size = int(config.get("text_config", config)["vocab_size"])
        return make_documents(vocab_size=vocab_size, packed=self.packed)

    def run_recipe(self, layout: Layout, *, clip: float) -> Recipe:
        """The recipe of one layout: pretrained weights from the small model's folder."""
        recipe = self.recipe
        parallel = Parallel(
            fsdp_size=layout.num_ranks // layout.dp_replicate_size,
            ep_size=layout.ep_size,
            dp_replicate_size=layout.dp_replicate_size,
            ep_implementation=recipe.parallel.ep_implementation,
            reduce_dtype=recipe.parallel.reduce_dtype,
        )
        attention = recipe.model.attn_implementation
        return dataclasses.replace(
            recipe,
            model=Model(source=str(self.weights), dtype="float32", attn_implementation=attention),
            parallel=parallel,
            optim=dataclasses.replace(recipe.optim, lr=LR, eps=EPS, max_grad_norm=clip),
            train=dataclasses.replace(
                recipe.train,
                micro_batch_size=ROWS_PER_MICROBATCH // layout.num_ranks,
                grad_accum_steps=NUM_MICROBATCHES,
            ),
        )


def write_checks(path: Path, checks: list[Check]) -> None:
    """Rank 0 alone: the findings are the same on every rank."""
    if dist.get_rank() == 0:
        path.write_text(json.dumps([check.to_json() for check in checks]))
