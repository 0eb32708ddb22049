"""The lean optimizer over ranks: every layout steps to the same bits, and loads what any other one saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from moe_recipes.checkpoint.store import load_checkpoint, save_checkpoint
from moe_recipes.config.recipe import Optim
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.runtime.world import agree, barrier
from moe_recipes.train.lean_adamw import LeanAdamW
from moe_recipes.train.optim import build_optimizer, optimizer_entries, prepare_state
from moe_recipes.train.run import model_entries
from tests.ranks.launch import run_on_ranks
from tests.tiny_models import save_tiny_model, tiny_config

STEPS = 3
LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 4, 1), (4, 2, 2), (3, 1, 1)]
"""Ranks, ep_size, dp_replicate_size."""


def build(folder: Path, ep_size: int, replicate: int) -> tuple[nn.Module, LeanAdamW]:
    ranks = dist.get_world_size()
    layout = DistributedConfig(fsdp_size=ranks // replicate, ep_size=ep_size, dp_replicate_size=replicate)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **({"distributed_config": layout} if ranks > 1 else {})
    )
    optimizer = build_optimizer(model, Optim(name="lean_adamw", lr=1e-3, weight_decay=0.1))
    assert isinstance(optimizer, LeanAdamW)
    return model, optimizer


def step(model: nn.Module, optimizer: LeanAdamW, number: int) -> None:
    """A gradient that is a function of the weight alone, so that no layout's sums differ."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * (0.3 - 0.2 * number)
    optimizer.step()
    optimizer.zero_grad()


def group() -> dict:
    return {"rank": dist.get_rank(), "num_ranks": dist.get_world_size(), "barrier": barrier, "agree": agree}


def save(folder: Path, ep_size: int, replicate: int) -> None:
    model, optimizer = build(folder / "model", ep_size, replicate)
    for number in range(STEPS):
        step(model, optimizer, number)
    rank = dist.get_rank()
    entries = model_entries(model, rank=rank) | optimizer_entries(model, optimizer, rank=rank)
    place = folder / f"{dist.get_world_size()}-{ep_size}-{replicate}"
    save_checkpoint(place, STEPS, entries=entries, rank_tensors={}, state={}, identity={}, **group())


def load_all(folder: Path) -> None:
    """On one rank: the state that every layout reached, and one more step from each."""
    reference = None
    for layout in LAYOUTS:
        model, optimizer = build(folder / "model", 1, 1)
        prepare_state(optimizer, step=STEPS)
        entries = model_entries(model, rank=0) | optimizer_entries(model, optimizer, rank=0)
        path = folder / "-".join(map(str, layout)) / f"step-{STEPS:08d}"
        load_checkpoint(path, entries=entries, rank_tensors={}, identity={}, rank=0, num_ranks=1)
        step(model, optimizer, STEPS)
        state = {name: entry.tensor.clone() for name, entry in entries.items()}
        reference = reference or state
        assert reference.keys() == state.keys()
        assert [name for name in state if not torch.equal(state[name], reference[name])] == [], layout
    assert reference is not None
    kinds = {name.split(".")[1] for name in reference if name.startswith("optim.")}
    assert kinds == {"remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"}


def save_wide_model(folder: Path) -> None:
    """Rows of experts and projections are a multiple of the block, so that codes are used."""
    config = tiny_config("qwen3_moe")
    config.hidden_size, config.moe_intermediate_size = 128, 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def test_every_layout_reaches_the_same_bits_and_resumes_from_any_other(tmp_path):
    run_on_ranks(save_wide_model, 1, tmp_path / "model")
    for ranks, ep_size, replicate in LAYOUTS:
        run_on_ranks(save, ranks, tmp_path, ep_size, replicate)
    run_on_ranks(load_all, 1, tmp_path)


def check_whole_experts(folder: Path, ep_size: int, whole: bool) -> None:
    layout = DistributedConfig(fsdp_size=4, ep_size=ep_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=layout)
    for block in moe_blocks(model):
        assert isinstance(block.experts, FSDPModule) != whole
        for parameter in block.experts.parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().shape[0] == parameter.shape[0] // 4
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
    said = {found.name: found.applied for found in model.moe_recipes_optimizations}
    assert said.get("whole experts outside FSDP2", False) == whole


@pytest.mark.parametrize(("ep_size", "whole"), [(4, True), (2, False)])
def test_experts_with_one_owner_are_left_out_of_fsdp(tmp_path, ep_size, whole):
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    run_on_ranks(check_whole_experts, 4, tmp_path, ep_size, whole)
