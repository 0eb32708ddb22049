"""Saves beside the training: what they hold, that they never overlap, full disks, and a kill at every call."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_recipes.checkpoint.store import Entry, latest_checkpoint, load_checkpoint, verify_checkpoint
from moe_recipes.config.errors import CannotWriteError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.runtime.sharding import Rows
from moe_recipes.train import saves
from moe_recipes.train.saves import Saver
from tests.ranks.launch import RanksFailedError, run_on_ranks
from tests.unit.dying import SYSTEM_CALLS

ROWS = 1500
"""A rank's shard has more bytes than FEW_BYTES, all else has less."""

FEW_BYTES = 5000


class Optimizer:
    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}


def small_run(folder: Path, **checkpoint: Any) -> SimpleNamespace:
    """As much of a run as a saver needs: one tensor, cut over the ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    weight = torch.zeros(ROWS, 2)
    rows = Rows(start=rank * ROWS, count=ROWS, shape=(ranks * ROWS, 2), primary=True)
    section = {"asynchronous": True, "keep_last": 2, "keep_best": 0, "mtbf_hours": 10.0, **checkpoint}
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(
        recipe=SimpleNamespace(checkpoint=SimpleNamespace(**section)),
        folder=RunFolder(folder),
        world=SimpleNamespace(rank=rank, size=ranks, is_main=rank == 0, host="here"),
        optimizer=Optimizer(),
        entries=lambda: {"w": Entry(tensor=weight, rows=rows)},
        rank_tensors=lambda: {"rng": torch.full((4,), rank, dtype=torch.uint8)},
        weight=weight,
        identity={"model": "m"},
        step=0,
        last_durable_step=0,
        resumed=None,
        validation_loss=(-1, 0.0),
    )


def at_step(run: SimpleNamespace, step: int) -> None:
    run.step = step
    run.weight.fill_(step + run.world.rank / 10)


def held(folder: Path, step: int) -> None:
    """The checkpoint of a step holds what every rank had at that step."""
    path = folder / "ckpt" / f"step-{step:08d}"
    assert verify_checkpoint(path, hashes=True) == []
    ranks = json.loads((path / "manifest.json").read_text())["num_ranks"]
    whole = torch.zeros(ranks * ROWS, 2)
    rows = Rows(start=0, count=ranks * ROWS, shape=(ranks * ROWS, 2), primary=True)
    load_checkpoint(
        path,
        entries={"w": Entry(tensor=whole, rows=rows)},
        rank_tensors={},
        identity={"model": "m"},
        rank=0,
        num_ranks=1,
    )
    for rank in range(ranks):
        assert set(whole[rank * ROWS : (rank + 1) * ROWS].reshape(-1).tolist()) == {
            torch.tensor(step + rank / 10).item()
        }


def events(folder: Path) -> list[tuple[str, int]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(event["event"], event["step"]) for event in found]


def save_slowly(folder: Path) -> None:
    """The last rank takes long; the weights change as soon as a save returns."""
    run = small_run(folder)
    saver, real = Saver(run), os.fsync
    if run.world.rank == 1:
        os.fsync = lambda fd: (time.sleep(0.2), real(fd))[1]
    for step in (1, 2, 3):
        at_step(run, step)
        start = time.monotonic()
        saver.save(wait=False)
        if step == 1:
            assert time.monotonic() - start < 0.2, "the save was waited for"
            assert not saver.has_landed
        assert run.last_durable_step == step - 1
        run.weight.fill_(-1.0)
    saver.finish()
    assert run.last_durable_step == 3
    if run.world.is_main:
        assert saver.record().keys() >= {"since_durable_s", "checkpoint_gb_per_s", "checkpoint_interval_s"}
    assert saver.record().keys() == {"since_durable_s"}


def test_a_copy_is_written_while_the_weights_change_and_never_two_at_a_time(tmp_path: Path) -> None:
    run_on_ranks(save_slowly, 2, tmp_path / "run")
    assert events(tmp_path / "run") == [
        ("staging", 1), ("saving", 1), ("checkpoint", 1),
        ("staging", 2), ("saving", 2), ("checkpoint", 2),
        ("staging", 3), ("saving", 3), ("checkpoint", 3),
    ]  # fmt: skip
    assert RunFolder(tmp_path / "run").read_status()["last_durable_step"] == 3
    held(tmp_path / "run", 2)
    held(tmp_path / "run", 3)
    assert sorted(os.listdir(tmp_path / "run" / "ckpt")) == ["latest", "step-00000002", "step-00000003"]


def save_on_full_disks(folder: Path) -> None:
    run = small_run(folder)
    saver = Saver(run)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save(step: int, *, full: bool, wait: bool = False) -> None:
        at_step(run, step)
        if run.world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, most[1]) if full else most)
        saver.save(wait=wait)
        saver.finish()

    save(1, full=False)
    save(2, full=True)
    assert run.last_durable_step == 1
    if run.world.is_main:
        assert sorted(os.listdir(folder / "ckpt")) == ["latest", "step-00000001"]
    save(3, full=False)
    assert run.last_durable_step == 3
    save(4, full=True)
    for wait in (False, True):
        with pytest.raises(CannotWriteError, match=r"rank 1 cannot write .*rank-00001\.safetensors: File too large"):
            save(5, full=True, wait=wait)
    assert run.last_durable_step == 3


def test_a_full_disk_is_said_once_and_ends_the_run_the_second_time(tmp_path: Path) -> None:
    run_on_ranks(save_on_full_disks, 2, tmp_path / "run")
    said = [event for event in events(tmp_path / "run") if event[0] != "saving"]  # there where it had to be waited for
    assert said == [
        ("staging", 1), ("checkpoint", 1), ("staging", 2), ("save failed", 2), ("staging", 3), ("checkpoint", 3),
        ("staging", 4), ("save failed", 4), ("staging", 5), ("save failed", 5),
    ]  # fmt: skip
    held(tmp_path / "run", 1)
    held(tmp_path / "run", 3)
    assert latest_checkpoint(tmp_path / "run" / "ckpt").name == "step-00000003"


def save_without_memory(folder: Path) -> None:
    run = small_run(folder)
    saves.free_bytes = lambda: int(2 * ROWS * 8 / saves.FREE_SHARE) + (1 if run.world.rank == 0 else -1)
    saver = Saver(run)
    assert saver.staging is None
    at_step(run, 1)
    saver.save(wait=False)
    assert (saver.flight, run.last_durable_step) == (None, 1)
    saves.free_bytes = lambda: int(2 * ROWS * 8 / saves.FREE_SHARE) + 1
    assert Saver(run).staging is not None


def test_too_little_host_memory_saves_at_once(tmp_path: Path) -> None:
    run_on_ranks(save_without_memory, 2, tmp_path / "run")
    assert events(tmp_path / "run") == [("saving", 1), ("checkpoint", 1)]
    held(tmp_path / "run", 1)


def save_and_die(folder: Path, dying_rank: int, at: int) -> None:
    """One rank dies at its ``at``-th call that changes the disk, in the thread that writes; the others see it."""
    run = small_run(folder, keep_last=1)
    saver = Saver(run)
    at_step(run, 1)
    saver.save(wait=True)
    calls, real_mkdir = 0, os.mkdir

    def counted(real):
        def call(*args, **keywords):
            nonlocal calls
            calls += 1
            if run.world.rank == dying_rank and calls == at:
                real_mkdir(folder / "killed")
                os._exit(9)
            return real(*args, **keywords)

        return call

    at_step(run, 2)
    real = {name: getattr(os, name) for name in SYSTEM_CALLS}
    for name in SYSTEM_CALLS:
        setattr(os, name, counted(real[name]))
    saver.save(wait=False)
    run.weight.fill_(-1.0)
    saver.flight.future.result()
    for name in SYSTEM_CALLS:
        setattr(os, name, real[name])
    saver.finish()


@pytest.mark.slow
@pytest.mark.parametrize("dying_rank", [0, 1])
def test_kill_point_at_every_call_of_every_rank(tmp_path: Path, dying_rank: int) -> None:
    for at in range(1, 200):
        folder = tmp_path / str(at)
        with suppress(RanksFailedError):
            run_on_ranks(save_and_die, 2, folder, dying_rank, at)
        found = latest_checkpoint(folder / "ckpt")
        assert found.name in ("step-00000001", "step-00000002")
        held(folder, int(found.name[5:]))
        pointed = (folder / "ckpt" / "latest").read_text().strip()
        held(folder, int(pointed[5:]))
        if not (folder / "killed").exists():
            assert at > (20 if dying_rank == 0 else 6)
            assert found.name == "step-00000002"
            return
    raise AssertionError("the save never ended")
