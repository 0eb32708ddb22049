"""Activation checkpointing: same gradients, the router and the dispatch once, attention twice, no router input kept."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moe_recipes.models.blocks import moe_blocks
from moe_recipes.moe import all_to_all, experts
from moe_recipes.moe.recompute import checkpoint_contexts, route_once
from moe_recipes.train.loop import batch_loss, forward_backward
from moe_recipes.train.run import Run
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import (
    NUM_MICROBATCHES,
    NUM_ROWS,
    SEQ_LEN,
    build_run,
    rank_batches,
    save_weights,
    whole_gradients,
    worst,
)

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    for family in FAMILIES:
        run_on_ranks(save_weights, 1, family, root / family)
    return root


def gradients(run: Run, family: str) -> dict[str, torch.Tensor]:
    forward_backward(run, rank_batches(family), num_label_tokens=100.0)
    return whole_gradients(run.model)


def check_same_gradients(folder: Path, family: str, ep_size: int) -> None:
    plain = gradients(build_run(folder / family, ep_size=ep_size), family)
    full = gradients(build_run(folder / family, ep_size=ep_size, checkpointing="full"), family)
    differ = [name for name in plain if not torch.equal(plain[name], full[name])]
    assert differ == []

    by_transformers = build_run(folder / family, ep_size=ep_size)
    by_transformers.model.gradient_checkpointing_enable()
    assert worst(gradients(by_transformers, family), plain)[0] <= 1e-6


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size"),
    [
        ("qwen3_moe", 2, 2),
        *(
            pytest.param(family, ranks, ep, marks=pytest.mark.slow)
            for family in FAMILIES
            for ranks, ep in [(1, 1), (4, 2)]
        ),
    ],
)
def test_recomputed_gradients_are_the_same(weights, family, num_ranks, ep_size):
    run_on_ranks(check_same_gradients, num_ranks, weights, family, ep_size)


def counted(
    calls: Counter, name: str, function: Callable[..., Any], chosen: list[torch.Tensor] | None = None
) -> Callable[..., Any]:
    """The function, counting its calls; of a router also how many tokens picked each of the 8 experts."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        result = function(*args, **kwargs)
        if chosen is not None:
            chosen.append(torch.bincount(result[2].flatten(), minlength=8))
        return result

    return call


def check_calls(folder: Path, family: str, ep_size: int) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

    calls: Counter = Counter()
    chosen: list[torch.Tensor] = []
    for owner, method, name in (
        (qwen.Qwen3MoeTopKRouter, "forward", "router"),
        (deepseek.DeepseekV3TopkRouter, "forward", "router"),
        (qwen.Qwen3MoeAttention, "forward", "attention"),
        (deepseek.DeepseekV3Attention, "forward", "attention"),
        (all_to_all, "make_plan", "plan"),
        (experts, "sort_by_expert", "sort"),
        (experts, "gated_experts", "experts"),
    ):
        setattr(owner, method, counted(calls, name, getattr(owner, method), chosen if name == "router" else None))
    run = build_run(folder / family, ep_size=ep_size, checkpointing="full")
    forward_backward(run, rank_batches(family), num_label_tokens=100.0)
    layers, blocks = run.model.config.num_hidden_layers, len(moe_blocks(run.model))
    assert blocks == 2
    assert calls == {
        "router": blocks * NUM_MICROBATCHES,
        "sort": blocks * NUM_MICROBATCHES,
        "attention": 2 * layers * NUM_MICROBATCHES,
        "experts": 2 * blocks * NUM_MICROBATCHES,
        **({"plan": blocks * NUM_MICROBATCHES} if ep_size > 1 else {}),
    }
    assert run.load is not None
    picked = torch.stack(chosen).view(NUM_MICROBATCHES, blocks, 8).sum(dim=0)
    dist.all_reduce(picked)
    load = run.load.collect()
    assert torch.equal(load, picked)
    assert load.sum(dim=1).tolist() == [run.model.config.num_experts_per_tok * NUM_ROWS * SEQ_LEN] * blocks
    assert run.load.collect().sum() == 0


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size"), [("qwen3_moe", 1, 1), ("qwen3_moe", 2, 2), ("deepseek_v3", 2, 2)]
)
def test_recomputation_routes_and_plans_once(weights, family, num_ranks, ep_size):
    run_on_ranks(check_calls, num_ranks, weights, family, ep_size)


def kept_bytes(block: Callable[..., Any], hidden: torch.Tensor) -> int:
    """Bytes that the graph of a checkpointed block holds alone, beyond its input, output and weights."""

    def storages() -> dict[int, int]:
        gc.collect()
        found = {}
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter):  # traced tensors have no memory
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return found

    before = storages()
    out = checkpoint(block, hidden, use_reentrant=False, context_fn=checkpoint_contexts)
    out = out[0] if isinstance(out, tuple) else out
    held = {pointer: size for pointer, size in storages().items() if pointer not in before}
    held.pop(out.untyped_storage().data_ptr())
    kept = sum(held.values())
    out.sum().backward()
    return kept


def check_router_input_is_not_kept(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe", dtype=torch.float32)
    layer = model.model.layers[0]
    route_once(layer.mlp.gate)

    def block(hidden: torch.Tensor) -> torch.Tensor:
        return layer.mlp(layer.post_attention_layernorm(hidden))

    hidden = torch.randn(4, 256, 64, requires_grad=True)
    tokens = 4 * 256
    # The router's outputs: logits and probabilities of 8 experts, weights and indices of 2; never 64 hidden values.
    assert kept_bytes(block, hidden) < tokens * 4 * 64


def test_the_router_input_is_not_kept(weights):
    run_on_ranks(check_router_input_is_not_kept, 1, weights)


def check_saved_tensors(folder: Path) -> None:
    """What autograd is asked to save, in bytes, without and with checkpointing."""

    def saved_bytes(checkpointing: str) -> int:
        run = build_run(folder / "qwen3_moe", checkpointing=checkpointing)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = batch_loss(run, rank_batches("qwen3_moe")[0]).total
        loss.backward()
        return sum(kept.values())

    assert saved_bytes("full") < saved_bytes("none") / 4


def test_checkpointing_saves_less(weights):
    run_on_ranks(check_saved_tensors, 1, weights)
