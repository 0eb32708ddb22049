"""Rows through CUDA symmetric memory, on two GPUs: the bits of all-to-all, no host wait, and no race."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from moe_recipes.config.resolve import load_recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.moe import symmetric
from moe_recipes.moe.symmetric_memory import PeerMemory
from moe_recipes.runtime.sharding import local_tensor
from moe_recipes.runtime.world import join_world
from moe_recipes.train.loop import exact_gradients, forward_backward, load_step
from moe_recipes.train.run import Run, setup

RANKS = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA GPUs"),
]

RECIPE = """
name: symmetric-test
model: {source: "package:tiny_qwen3_moe", weights: random, dtype: bfloat16}
parallel: {fsdp_size: 2, ep_size: 2}
data: {format: random_tokens, seq_len: 333}
optim: {name: lean_adamw, lr: 1e-3}
train: {steps: 8, micro_batch_size: 3, grad_accum_steps: 2, deterministic: true}
log: {wandb: off}
"""
SYMMETRIC = f"parallel.ep_implementation={symmetric.NAME}"


def _rank_main(rank: int, port: int, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join_world()
    fn(*args)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    os._exit(0)


def on_two_gpus(fn: Callable[..., None], *args: Any) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(_rank_main, (port, fn, args), nprocs=RANKS)


def build(folder: Path, *overrides: str) -> Run:
    path = folder / f"recipe-{os.environ['RANK']}.yaml"
    path.write_text(RECIPE)
    (folder / "run").mkdir(exist_ok=True)
    recipe = load_recipe(str(path), [*overrides, f"run_dir={folder / 'run'}"])
    return setup(recipe, RunFolder(folder / "run"), join_world())


def gradients(run: Run, *, steps: int = 3) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    found = []
    for step in range(steps):
        losses = exact_gradients(run, load_step(run, step), num_label_tokens=1000.0)
        found.append((losses, {n: local_tensor(p.grad).clone() for n, p in run.model.named_parameters()}))
        run.optimizer.zero_grad(set_to_none=True)
    return found


def check_equal(got: list[Any], wanted: list[Any]) -> None:
    for (losses, mine), (their_losses, theirs) in zip(got, wanted, strict=True):
        assert losses == their_losses
        assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


def check_bits(folder: Path) -> None:
    for checkpointing in ("none", "full"):
        shared = f"train.activation_checkpointing={checkpointing}"
        wanted = gradients(build(folder, shared))
        for factor in (1.15, 0.3):  # with room, and with so little that each step after the first is computed again
            check_equal(
                gradients(build(folder, shared, SYMMETRIC, f"parallel.expert_capacity_factor={factor}")), wanted
            )


def test_gradients_have_the_bits_of_all_to_all(tmp_path):
    on_two_gpus(check_bits, tmp_path)


def check_no_host_wait(folder: Path) -> None:
    for checkpointing in ("none", "full"):
        run = build(folder, SYMMETRIC, f"train.activation_checkpointing={checkpointing}")
        gradients(run)
        batches = load_step(run, 3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        with symmetric.RoutedRows(2.0) as rows:
            forward_backward(run, batches, num_label_tokens=1000.0)
            counts = rows.counts(run.world.device)
        torch.cuda.set_sync_debug_mode("default")
        assert len(counts) == run.model.config.num_hidden_layers
        assert rows.missing(counts.tolist()) == 0


def test_the_host_waits_nowhere_in_forward_and_backward(tmp_path):
    on_two_gpus(check_no_host_wait, tmp_path)


def _streams(run: Run) -> list[torch.cuda.Stream]:
    """The one that computes and those of FSDP2's collectives."""
    streams = {torch.cuda.current_stream()}
    for module in run.model.modules():
        if isinstance(module, FSDPModule):
            context = module._get_fsdp_state()._comm_ctx
            streams |= {s for s in vars(context).values() if isinstance(s, torch.cuda.Stream)}
    return list(streams)


@contextmanager
def delays(run: Run, *, seed: int):
    """Before and after every meeting, and before every module, some stream of some rank stands still for a while."""
    draw, streams, meet = random.Random(seed * RANKS + run.world.rank), _streams(run), PeerMemory.meet

    def sleep(*_: object) -> None:
        if draw.random() < 0.3:
            with torch.cuda.stream(draw.choice(streams)):
                torch.cuda._sleep(draw.randrange(2_000_000))

    def slow_meet(self: PeerMemory) -> None:
        sleep()
        meet(self)
        sleep()

    hooks = [module.register_forward_pre_hook(sleep) for module in run.model.modules()]
    PeerMemory.meet = slow_meet
    try:
        yield
    finally:
        PeerMemory.meet = meet
        for hook in hooks:
            hook.remove()


def check_no_race(folder: Path) -> None:
    run = build(folder, SYMMETRIC)
    gradients(run)
    assert len(_streams(run)) > 1
    wanted = gradients(run)
    for seed in range(4):
        with delays(run, seed=seed):
            got = gradients(run)
        check_equal(got, wanted)


def test_delays_on_any_stream_change_no_bit(tmp_path):
    on_two_gpus(check_no_race, tmp_path)
