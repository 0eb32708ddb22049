"""One arm of a comparison, one rank of it: ``python -m moe_recipes.bench.arm ARM``; ``__main__.py`` starts it.

Both arms run the same shape, the same layout, the same random tokens and as many rows, and are timed alike. What
differs is the arm itself:

    ours           the trainer: its setup, its step, its optimizer, gradient clipping included
    transformers   Transformers' model, dispatcher, experts (grouped_mm), checkpointing and loss, torch's fused AdamW
                   with states in the weights' dtype, no clipping; Mamba through mamba-ssm's kernels where they are
                   installed, with the time-step limits of its config, which Transformers 5.24 does not look at
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from moe_recipes.bench.parts import profiled
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.loader import Batch, Batches, RandomRows
from moe_recipes.models.attention import NAME as ATTENTION
from moe_recipes.models.auto import draw_plain_model
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.models.build import layout, load_config, read_source
from moe_recipes.models.time_step import honour_time_step_limit
from moe_recipes.moe.symmetric import RoutedRows
from moe_recipes.plan.flops import peak_flops, train_flops_per_token
from moe_recipes.runtime.world import World, barrier, join_world, max_over_ranks
from moe_recipes.train.loop import forward_backward, train_step
from moe_recipes.train.metrics import device_memory
from moe_recipes.train.optim import parameter_groups
from moe_recipes.train.run import setup

Step = Callable[[list[Batch]], object]


def balance_gates(model: nn.Module) -> None:
    """Replace every router by a fixed even choice: token t takes experts t*K .. t*K + K - 1, modulo E, weights 1/K.

    The rival's published figures use this choice. No router is computed, and a token's experts lie side by side, so
    most of them are on one rank: not training, only a like-for-like comparison.
    """
    for block in moe_blocks(model):
        assert block.router is not None
        top_k, num_experts = block.router.top_k, model.config.get_text_config().num_experts

        def forward(hidden: Tensor, *, top_k: int = top_k, num_experts: int = num_experts) -> tuple[Tensor, ...]:
            tokens = hidden.numel() // hidden.shape[-1]
            index = torch.arange(tokens * top_k, device=hidden.device).view(tokens, top_k) % num_experts
            weights = torch.full((tokens, top_k), 1 / top_k, dtype=hidden.dtype, device=hidden.device)
            return hidden.new_zeros(tokens, num_experts), weights, index

        block.router.forward = forward  # type: ignore[method-assign]


def ours(recipe: Recipe, world: World, *, balanced: bool) -> tuple[Batches, Step, Step]:
    """Batches, a whole optimizer step, and forward plus backward alone."""
    run = setup(recipe, RunFolder(tempfile.mkdtemp(prefix="moe-recipes-bench-")), world)
    if balanced:
        balance_gates(run.model)

    def gradients(batches: list[Batch]) -> None:
        labels = sum(batch.num_label_tokens for batch in batches) * world.size
        with RoutedRows(recipe.parallel.expert_capacity_factor):
            forward_backward(run, batches, num_label_tokens=labels)
        run.optimizer.zero_grad(set_to_none=True)

    return run.batches, lambda batches: train_step(run, batches), gradients


def attention_of_transformers(recipe: Recipe, device: torch.device) -> str:
    """The recipe's attention; Transformers' fastest of its own where the recipe names this package's. GPT-OSS has no
    ``sdpa`` there, and no sinks in ``flex_attention`` on the CPU."""
    asked = recipe.model.attn_implementation
    if read_source(recipe).config.get("model_type") == "gpt_oss" and asked in (ATTENTION, "sdpa"):
        return "flex_attention" if device.type == "cuda" else "eager"
    return "sdpa" if asked == ATTENTION else asked


def plain_transformers(recipe: Recipe, world: World, *, balanced: bool) -> tuple[Batches, Step, Step]:
    """The same for Transformers alone. Only the drawing of random weights on a distributed model is this package's."""
    source = read_source(recipe)
    distributed = layout(recipe)
    distributed.ep_implementation = "all_to_all"
    distributed.fsdp_mixed_precision = False
    model = draw_plain_model(
        load_config(source, Path(tempfile.mkdtemp(prefix="moe-recipes-bench-"))),
        distributed,
        seed=recipe.train.seed,
        dtype=getattr(torch, recipe.model.dtype),
        attn_implementation=attention_of_transformers(recipe, world.device),
        experts_implementation="grouped_mm",
    )
    honour_time_step_limit(model)
    model.train()
    if recipe.train.activation_checkpointing == "full":
        model.activation_checkpointing_enable()
    if balanced:
        balance_gates(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.0), lr=recipe.optim.lr, fused=True)
    rows = RandomRows(vocab_size=source.config["vocab_size"], seq_len=recipe.data.seq_len, seed=recipe.train.seed)
    batches = Batches(
        rows,
        rank=world.rank,
        num_ranks=world.size,
        micro_batch_size=recipe.train.micro_batch_size,
        grad_accum_steps=recipe.train.grad_accum_steps,
        seed=recipe.train.seed,
        shuffle=False,
    )

    def gradients(step_batches: list[Batch]) -> None:
        for batch in step_batches:
            ids = batch.input_ids.to(world.device)
            (model(input_ids=ids, labels=ids, use_cache=False).loss / len(step_batches)).backward()

    def forward_and_backward(step_batches: list[Batch]) -> None:
        gradients(step_batches)
        optimizer.zero_grad(set_to_none=True)

    def step(step_batches: list[Batch]) -> None:
        gradients(step_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batches, step, forward_and_backward


ARMS = {"ours": ours, "transformers": plain_transformers}


def seconds_per_step(step: Step, batches: Batches, *, warmup: int, steps: int, device: torch.device) -> float:
    """Median wall time of ``steps`` steps after ``warmup``, each the slowest rank's; batches are made before."""
    prepared = [batches.step(number) for number in range(4)]
    for number in range(warmup):
        step(prepared[number % 4])
    durations = []
    for number in range(steps):
        wait_for(device)
        barrier()
        start = time.perf_counter()
        step(prepared[number % 4])
        wait_for(device)
        durations.append(time.perf_counter() - start)
    return median(max_over_ranks(*durations))


def model_flops_utilization(recipe: Recipe, tokens_per_s: float, device: torch.device) -> float | None:
    """Share of the device's peak that the model's own arithmetic takes (``plan.flops.FORMULA``); None where either is
    not known."""
    flops = train_flops_per_token(read_source(recipe).config, seq_len=recipe.data.seq_len)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return tokens_per_s * flops / peak if flops and peak else None


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.arm")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--recipe-json", required=True)
    parser.add_argument("--gate", choices=["real", "balanced"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    recipe, world = recipe_from_dict(json.loads(arguments.recipe_json)), join_world()
    batches, step, gradients = ARMS[arguments.arm](recipe, world, balanced=arguments.gate == "balanced")
    clock: dict[str, Any] = {"warmup": arguments.warmup, "steps": arguments.steps, "device": world.device}
    with_s = seconds_per_step(step, batches, **clock)
    without_s = seconds_per_step(gradients, batches, **clock)
    allocated, reserved = max_over_ranks(*device_memory(world.device).values())
    # On every rank: a step has collectives. After the memory was read, which the profiler would add to.
    parts = profiled(lambda: step(batches.step(0)), world.device)
    tokens = recipe.tokens_per_step / world.size
    if world.is_main:
        result = {
            "arm": arguments.arm,
            "gate": arguments.gate,
            "tokens_per_s_per_gpu": tokens / with_s,
            "tokens_per_s_per_gpu_without_optimizer": tokens / without_s,
            "step_s": with_s,
            "forward_backward_s": without_s,
            "peak_allocated_gib": allocated,
            "peak_reserved_gib": reserved,
            "mfu": model_flops_utilization(recipe, tokens / with_s, world.device),
            "parts_ms": parts,
        }
        arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
