"""One learning curve, one process: ``python -m moe_recipes.bench.learn ARM``; ``curves.py`` starts it.

Both arms draw the same weights from the recipe's seed, read the same rows in the same order, follow the same learning
rate and clip at the same norm:

    ours           the trainer's own step: bfloat16 weights, ``lean_adamw``'s exact float32 master
    transformers   Transformers' model and torch's fused AdamW on float32 weights, bfloat16 by autocast; Transformers'
                   load-balancing loss and documents kept apart by its own masks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from moe_recipes.bench.arm import wait_for
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.loader import Batch, Batches
from moe_recipes.models.auto import draw_plain_model
from moe_recipes.models.build import layout, load_config, load_tokenizer, read_source
from moe_recipes.runtime.world import World, join_world
from moe_recipes.train.loop import load_step, train_step
from moe_recipes.train.optim import learning_rate, parameter_groups
from moe_recipes.train.run import open_batches, seed_everything, setup

Step = Callable[[int], float]
"""Number of the step, from 0 -> its loss over the label tokens."""


def ours(recipe: Recipe, world: World) -> Step:
    run = setup(recipe, RunFolder(tempfile.mkdtemp(prefix="moe-recipes-curves-")), world)
    return lambda number: train_step(run, load_step(run, number)).loss


def plain_transformers(recipe: Recipe, world: World) -> Step:
    source, scratch = read_source(recipe), Path(tempfile.mkdtemp(prefix="moe-recipes-curves-"))
    seed_everything(recipe.train.seed + world.rank, deterministic=recipe.train.deterministic)
    tokenizer = load_tokenizer(recipe, source)
    batches, _ = open_batches(recipe, RunFolder(scratch), world, tokenizer, vocab_size=source.vocab_size)
    model = draw_plain_model(
        load_config(source, scratch / "config"),
        layout(recipe),
        seed=recipe.train.seed,
        dtype=getattr(torch, recipe.model.dtype),  # the numbers that the other arm starts from
        attn_implementation=recipe.model.attn_implementation,
        experts_implementation="grouped_mm",
    )
    model = model.float()
    model.train()
    groups = parameter_groups(model, weight_decay=recipe.optim.weight_decay)
    betas = (recipe.optim.betas[0], recipe.optim.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=betas, eps=recipe.optim.eps)
    return lambda number: transformers_step(recipe, model, optimizer, batches, number, device=world.device)


def transformers_step(
    recipe: Recipe,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    number: int,
    *,
    device: torch.device,
) -> float:
    """One optimizer step of the second arm, on one device."""
    microbatches = batches.step(number)
    labels = sum(batch.num_label_tokens for batch in microbatches)
    aux_coef, loss_sum = recipe.train.router_aux_loss_coef, torch.zeros((), device=device)
    for batch in microbatches:
        loss, aux = _losses(model, batch, device, aux=aux_coef > 0, autocast=recipe.model.dtype == "bfloat16")
        target = loss / labels
        loss_sum += target.detach()
        if aux is not None:
            target = target + aux_coef * aux / len(microbatches)
        target.backward()
    if recipe.optim.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe.optim, step=number, steps=recipe.train.steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss_sum)


def _losses(
    model: torch.nn.Module, batch: Batch, device: torch.device, *, aux: bool, autocast: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the losses of the label tokens, and Transformers' load-balancing loss."""
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = model(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            use_cache=False,
            output_router_logits=aux,
        )
    logits = output.logits.float().flatten(0, 1)
    labels = batch.shift_labels.to(device).flatten()
    return functional.cross_entropy(
        logits, labels, ignore_index=-100, reduction="sum"
    ), output.aux_loss if aux else None


ARMS = {"ours": ours, "transformers": plain_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.learn")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--recipe-json", required=True)
    parser.add_argument("--steps", type=int, required=True, help="stop after so many of the recipe's steps")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    recipe, world = recipe_from_dict(json.loads(arguments.recipe_json)), join_world()
    recipe = dataclasses.replace(recipe, log=dataclasses.replace(recipe.log, wandb="off"))
    step, losses, seconds = ARMS[arguments.arm](recipe, world), [], []
    for number in range(arguments.steps):
        start = time.perf_counter()
        losses.append(step(number))
        wait_for(world.device)
        seconds.append(time.perf_counter() - start)
    if world.is_main:
        arguments.out.write_text(json.dumps({"losses": losses, "step_s": seconds}))


if __name__ == "__main__":
    main()
