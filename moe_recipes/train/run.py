"""What the loop owns, built in order: ranks, model, data, optimizer, and the checkpoint that it continues."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.config.errors import RecipeError
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.loader import Batches
from moe_recipes.data.prepare import open_data
from moe_recipes.models.auto import enable_activation_checkpointing
from moe_recipes.models.blocks import MoeBlock, moe_blocks
from moe_recipes.models.build import Source, build_model, load_tokenizer, read_source, tokenizer_hash
from moe_recipes.models.exporting.source import check_like_source
from moe_recipes.models.loading.load import report_of
from moe_recipes.models.loss import Wanted, install_loss
from moe_recipes.models.mtp import choose_mtp, mtp_weight
from moe_recipes.models.packing import why_not_packed
from moe_recipes.models.whole_experts import sum_gradients
from moe_recipes.moe.balance import CORRECTION_BIAS
from moe_recipes.moe.expert_load import ExpertLoad
from moe_recipes.runtime.optimizations import Optimization, describe
from moe_recipes.runtime.sharding import local_rows, local_tensor
from moe_recipes.runtime.world import World, together, wait_for_main
from moe_recipes.train.optim import GradientClip, build_optimizer, optimizer_entries

logger = logging.getLogger("moe_recipes")
WEIGHTS = "model."
"""What the names of weights and buffers start with in a checkpoint."""


@dataclass(kw_only=True)
class Trained:
    """A model on this rank, and the run that it comes from: all that an export needs."""

    recipe: Recipe
    folder: RunFolder
    world: World
    source: Source
    model: PreTrainedModel
    step: int = 0
    """Finished optimizer steps."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What this start continued."""

    path: Path
    seconds: float
    """That this rank took to load it."""

    damaged: tuple[str, ...]
    """Newer checkpoints that were passed over, each with what is wrong with it."""


@dataclass(kw_only=True)
class Run(Trained):
    """One training run on this rank."""

    tokenizer: PreTrainedTokenizerBase | None
    optimizer: torch.optim.Optimizer
    clip: GradientClip
    batches: Batches
    validation: Batches | None
    load: ExpertLoad | None
    moving_biases: dict[int, nn.Module]
    """Routers, by layer, whose correction bias moves after each step."""

    optimizations: list[Optimization]
    identity: dict[str, Any]
    last_durable_step: int = 0
    resumed: Resumed | None = None
    validation_loss: tuple[int, float] = (-1, 0.0)
    """The newest one, behind the step at which it was measured."""

    @property
    def mtp_coef(self) -> float:
        """Weight of the multi-token-prediction loss; 0 where the model has no such layers, or keeps them."""
        return mtp_weight(self.model, self.recipe.train.mtp_loss_coef)

    @property
    def dp_size(self) -> int:
        """Ranks that see distinct batches: all of them."""
        return self.world.size

    def entries(self) -> dict[str, Entry]:
        """Every tensor that a checkpoint holds, by global name; this rank's part of each."""
        rank = self.world.rank
        return model_entries(self.model, rank=rank) | optimizer_entries(self.model, self.optimizer, rank=rank)

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        """Random generator states of this rank."""
        states = {"rng.cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            states["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
        return states

    def restore_rank_tensors(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["rng.cpu"])
        if "rng.cuda" in states and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states["rng.cuda"], self.world.device)


def model_entries(model: PreTrainedModel, *, rank: int) -> dict[str, Entry]:
    """Weights and persistent buffers by global name ``model.NAME``; this rank's part of each."""
    entries = {
        f"{WEIGHTS}{name}": Entry(tensor=local_tensor(parameter.detach()), rows=local_rows(parameter, rank=rank))
        for name, parameter in model.named_parameters()
    }
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            entries[f"{WEIGHTS}{name}"] = Entry(tensor=buffer, rows=local_rows(buffer, rank=rank))
    return entries


def model_identity(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What must be the same when the weights of a checkpoint are loaded."""
    return {"model_config": source.config_hash, "dtype": recipe.model.dtype}


def make_model(recipe: Recipe, source: Source) -> PreTrainedModel:
    """``build_model`` with a scratch folder of this rank's own."""
    scratch = Path(tempfile.mkdtemp(prefix="moe-recipes-"))
    try:
        return build_model(recipe, source, scratch=scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed every generator of this process; with ``deterministic`` torch refuses or replaces unrepeatable kernels."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _trained_blocks(model: PreTrainedModel) -> list[MoeBlock]:
    """All but those of multi-token-prediction layers that are kept as they are, which get no token."""
    return [block for block in moe_blocks(model) if any(p.requires_grad for p in block.experts.parameters())]


def _agreed_load(model: PreTrainedModel, device: torch.device) -> ExpertLoad | None:
    blocks = {block.layer: block.experts for block in _trained_blocks(model)}
    if not blocks:
        return None
    # From the weights: configs have many names for it, and the module counts the experts of this rank only.
    num_experts = max(experts.down_proj.shape[0] for experts in blocks.values())
    return ExpertLoad(blocks, num_experts=num_experts, device=device)


def open_batches(
    recipe: Recipe, folder: RunFolder, world: World, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int
) -> tuple[Batches, Batches | None]:
    """Training and held-out batches of this rank; rank 0 tokenises where there is no cache yet."""
    train = recipe.train
    rows, held_out, report = open_data(
        recipe.data,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=vocab_size,
        cache_dir=Path(recipe.data.cache_dir) if recipe.data.cache_dir else folder.cache,
        seed=train.seed,
        is_main=world.is_main,
        barrier=lambda: wait_for_main("data", is_main=world.is_main),
    )
    if world.is_main and report.train is not None:
        logger.info(
            "data: %s rows, %s tokens in %s packed rows, %.1f%% full; %d rows were longer than seq_len (%s)",
            f"{report.train.rows:,}",
            f"{report.train.tokens:,}",
            f"{report.train.packed_rows:,}",
            100 * report.train.fill_fraction,
            report.train.rows_split + report.train.rows_truncated + report.train.rows_skipped,
            recipe.data.long_rows,
        )
        folder.update_manifest(data=dataclasses.asdict(report))
    shared: dict[str, Any] = {"rank": world.rank, "num_ranks": world.size, "micro_batch_size": train.micro_batch_size}
    batches = Batches(
        rows, grad_accum_steps=train.grad_accum_steps, seed=train.seed, shuffle=recipe.data.shuffle, **shared
    )
    if held_out is None or not train.validate_every_steps:
        return batches, None
    count = min(train.validation_batches, max(1, held_out.num_rows // (world.size * train.micro_batch_size)))
    return batches, Batches(held_out, grad_accum_steps=count, seed=train.seed, shuffle=False, **shared)


def prepare(model: PreTrainedModel, recipe: Recipe) -> list[Optimization]:
    """Give a built model the recipe's loss and recompute; returns all that was found and done, to be reported.

    Raises:
        RecipeError: the model's family cannot do what the recipe asks for.
    """
    train, found = recipe.train, list(model.moe_recipes_optimizations)
    mtp_coef, chosen = choose_mtp(model, train.mtp_loss_coef)
    found.append(chosen)
    full = train.activation_checkpointing == "full"
    if full:
        enable_activation_checkpointing(model)
    reason = f"train.activation_checkpointing is {'full' if full else 'none'}"
    found.append(Optimization("activation checkpointing", full, reason))
    found.append(
        install_loss(
            model,
            fused=recipe.kernels.loss == "fused",
            chunk_tokens=recipe.kernels.loss_chunk_tokens,
            wanted=Wanted(
                aux_loss=train.router_aux_loss_coef > 0, z_loss=train.router_z_loss_coef > 0, mtp_coef=mtp_coef
            ),
        )
    )
    packing = recipe.data.packing and recipe.data.format != "random_tokens"
    if packing and (leak := why_not_packed(model)):
        raise RecipeError(f"data.packing=true: {leak}; set data.packing: false")
    found.append(Optimization("packing", packing, "documents share rows" if packing else "one document a row"))
    return found


def _moving_biases(model: PreTrainedModel, recipe: Recipe) -> dict[int, nn.Module]:
    """By layer, the routers whose correction bias the recipe moves: those of all layers that train.

    Raises:
        RecipeError: it has none.
    """
    rate = recipe.train.router_bias_update_rate
    if not rate:
        return {}
    routers = {block.layer: block.router for block in _trained_blocks(model)}
    found = {layer: r for layer, r in routers.items() if r is not None and hasattr(r, CORRECTION_BIAS)}
    if not found:
        raise RecipeError(
            f"train.router_bias_update_rate={rate}: the routers of {type(model).__name__.removeprefix('FSDP')} have no"
            " correction bias; set it to 0 and use train.router_aux_loss_coef"
        )
    for layer, router in found.items():
        dtype = getattr(router, CORRECTION_BIAS).dtype
        assert dtype == torch.float32, f"layer {layer}: the correction bias is {dtype}, steps would be rounded away"
    return found


def setup(recipe: Recipe, folder: RunFolder, world: World) -> Run:
    """Build everything that a run needs, up to but not including the checkpoint that it may continue.

    What could not be exported in the end is refused here, before it is trained.
    """
    source = read_source(recipe)
    seed_everything(recipe.train.seed + world.rank, deterministic=recipe.train.deterministic)
    tokenizer = load_tokenizer(recipe, source)
    batches, validation = open_batches(recipe, folder, world, tokenizer, vocab_size=source.vocab_size)
    model = make_model(recipe, source)
    if world.is_main and (read := report_of(model)) is not None:
        folder.update_manifest(weights=dataclasses.asdict(read))
    if recipe.model.weights == "pretrained" and recipe.checkpoint.export:
        together(lambda: check_like_source(model, source.folder) if world.is_main else None)
    model.train()
    sum_gradients(model)
    found = prepare(model, recipe)
    found.append(Optimization("FSDP2", world.size > 1, f"{world.size} ranks"))
    if world.is_main:
        logger.info("optimizations of %s: %s", type(model).__name__.removeprefix("FSDP"), describe(found))
        folder.update_manifest(optimizations=[o._asdict() for o in found])
    optimizer = build_optimizer(model, recipe.optim)
    identity = model_identity(recipe, source) | {
        "optimizer": recipe.optim.name,
        "data": batches.fingerprint,
        "rows_per_step": recipe.rows_per_step,
    }
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        source=source,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        clip=GradientClip(model, max_norm=recipe.optim.max_grad_norm, rank=world.rank),
        batches=batches,
        validation=validation,
        load=_agreed_load(model, world.device),
        moving_biases=_moving_biases(model, recipe),
        optimizations=found,
        identity=identity,
    )
