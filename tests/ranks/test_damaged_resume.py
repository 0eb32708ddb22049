"""Runs that resume from what a kill or a disk left: asynchronous saves, damaged checkpoints; to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig

from moe_recipes.config.run_folder import RunFolder
from moe_recipes.runtime.safetensors_header import read_header
from tests.ranks.runs import VOCAB_SIZE, events, records, signal_rank, steps, train, trained, when_step, write_task

STEPS = 9
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    tie_word_embeddings=False, max_position_embeddings=256,
)  # fmt: skip
TENSOR = "model.model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(
        tmp_path_factory.mktemp("damaged") / "task",
        CONFIG,
        parallel={"ep_size": 2},
        train={"steps": STEPS},
        checkpoint={"every_steps": 3, "keep_last": 3, "export": False},
    )


@pytest.fixture(scope="module")
def unbroken(task: Path) -> Path:
    """The run that nobody disturbs; it saves while training stands still."""
    run_dir = task.parent / "unbroken"
    done = train(task, run_dir)
    assert done.returncode == 0, done.stdout
    assert steps(run_dir) == list(range(1, STEPS + 1))
    return run_dir


def shards(run_dir: Path, step: int) -> dict[str, bytes]:
    """What the ranks wrote for a step: weights, moments, generators."""
    folder = run_dir / "ckpt" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def same_end(run_dir: Path, unbroken: Path) -> None:
    without = [{k: v for k, v in record.items() if k != "damaged_checkpoints"} for record in trained(run_dir)]
    assert without == trained(unbroken)
    assert len(shards(unbroken, STEPS)) == 2
    assert shards(run_dir, STEPS) == shards(unbroken, STEPS)
    assert RunFolder(run_dir).read_status()["state"] == "done"


def test_asynchronous_saves_are_the_same_bytes_and_a_kill_between_them_loses_none(task: Path, unbroken: Path) -> None:
    run_dir, beside = task.parent / "beside", "checkpoint.asynchronous=true"
    killed = train(task, run_dir, beside, meanwhile=when_step(run_dir, 7, signal_rank(1, signal.SIGKILL)))
    assert killed.returncode == 69, killed.stdout
    assert [event["step"] for event in events(run_dir, "staging")][:2] == [3, 6]
    done = train(task, run_dir, beside)
    assert done.returncode == 0, done.stdout
    assert events(run_dir, "resume")[0]["step"] in (3, 6, STEPS)
    same_end(run_dir, unbroken)
    for step in (3, 6):
        assert shards(run_dir, step) == shards(unbroken, step)


@pytest.mark.slow
def test_a_signal_during_an_asynchronous_save_waits_for_it_and_saves(task: Path, unbroken: Path) -> None:
    run_dir, often = task.parent / "signalled", ("checkpoint.asynchronous=true", "checkpoint.every_steps=1")
    stopped = train(task, run_dir, *often, meanwhile=when_step(run_dir, 4, signal_rank(0, signal.SIGTERM)))
    assert stopped.returncode == 75, stopped.stdout
    status = RunFolder(run_dir).read_status()
    assert status["last_durable_step"] == status["step"] == steps(run_dir)[-1] < STEPS
    assert not [name for name in os.listdir(run_dir / "ckpt") if ".tmp-" in name]
    done = train(task, run_dir, *often)
    assert done.returncode == 0, done.stdout
    same_end(run_dir, unbroken)


def flip(path: Path, name: str) -> None:
    with open(path, "r+b") as file:
        offset = read_header(file.fileno()).spans[name].offset
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, offset)[0] ^ 1]), offset)


def copy_up_to(unbroken: Path, run_dir: Path, step: int) -> None:
    """The run as it was when it had saved a step, and been killed."""
    shutil.copytree(unbroken, run_dir, symlinks=True)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run_dir / "ckpt" / f"step-{later:08d}", ignore_errors=True)
    (run_dir / "ckpt" / "latest").write_text(f"step-{step:08d}\n")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped byte", "truncated"])
def test_a_resume_goes_back_to_the_whole_checkpoint_and_says_so(task: Path, unbroken: Path, damage: str) -> None:
    run_dir = task.parent / damage.split()[0]
    copy_up_to(unbroken, run_dir, 6)
    shard = run_dir / "ckpt" / "step-00000006" / "rank-00001.safetensors"
    if damage == "truncated":
        os.truncate(shard, 1000)
    else:
        flip(shard, TENSOR)
    refused = train(task, run_dir, "checkpoint.fall_back=false")
    assert refused.returncode == 74, refused.stdout
    assert "checkpoint.fall_back is false" in RunFolder(run_dir).read_status()["cause"]
    done = train(task, run_dir)
    assert done.returncode == 0, done.stdout
    assert "DAMAGED CHECKPOINT: step-00000006 is damaged" in done.stdout
    assert shard.name in done.stdout
    if damage == "flipped byte":
        assert TENSOR in done.stdout
    (event,) = events(run_dir, "fell back")
    assert (event["step"], event["from_step"]) == (3, 6)
    assert events(run_dir, "resume")[-1]["step"] == 3
    marked = {record["step"] for record in records(run_dir) if record.get("damaged_checkpoints") == 1}
    assert marked == set(range(4, STEPS + 1))
    same_end(run_dir, unbroken)


@pytest.mark.slow
def test_a_named_checkpoint_is_exported(task: Path, unbroken: Path) -> None:
    run_dir = task.parent / "exported"
    shutil.copytree(unbroken, run_dir, symlinks=True)
    for step in (3, 6):
        command = [sys.executable, "-m", "moe_recipes.launch.cli", "ckpt", "export", f"{run_dir}/step-{step:08d}"]
        done = subprocess.run([*command, "--cpu"], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        exported = {}
        for path in (run_dir / "export").glob("*.safetensors"):
            exported |= load_file(path)
        saved = load_file(unbroken / "ckpt" / f"step-{step:08d}" / "rank-00000.safetensors")
        norm = "model.layers.0.input_layernorm.weight"
        assert saved[f"model.{norm}"].tolist() == exported[norm].tolist()[: len(saved[f"model.{norm}"])]
