"""A run that was stopped, killed or saved on the way ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, Qwen3MoeConfig

from moe_recipes.config.errors import NotFiniteError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.train.export_run import check_weights
from tests.ranks.launch import run_on_ranks
from tests.ranks.runs import (
    VOCAB_SIZE,
    events,
    exported_files,
    records,
    signal_rank,
    steps,
    train,
    trained,
    when_step,
    write_task,
)

STEPS = 12
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    tie_word_embeddings=False, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(
        tmp_path_factory.mktemp("resume") / "task",
        CONFIG,
        parallel={"ep_size": 2},
        data={"seq_len": 128},
        train={"steps": STEPS},
    )


@pytest.fixture(scope="module")
def unbroken(task: Path) -> Path:
    """The run that nobody disturbs."""
    run_dir = task.parent / "unbroken"
    done = train(task, run_dir)
    assert done.returncode == 0, done.stdout
    assert steps(run_dir) == list(range(1, STEPS + 1))
    assert len({record["loss"] for record in records(run_dir)}) == STEPS
    return run_dir


def test_every_file_of_a_run_has_the_permissions_that_new_files_have(unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    new = (tmp_path / "new").stat().st_mode
    files = [path for path in unbroken.rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_mode != new] == []


def same_end(run_dir: Path, unbroken: Path) -> None:
    assert trained(run_dir) == trained(unbroken)
    assert exported_files(run_dir) == exported_files(unbroken)
    assert RunFolder(run_dir).read_status()["state"] == "done"


def test_sigterm_to_one_rank_saves_on_all_and_resumes_to_the_same_bits(task: Path, unbroken: Path) -> None:
    run_dir = task.parent / "sigterm"
    stopped = train(task, run_dir, meanwhile=when_step(run_dir, 4, signal_rank(1, signal.SIGTERM)))
    assert stopped.returncode == 75, stopped.stdout
    status, done = RunFolder(run_dir).read_status(), steps(run_dir)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, done[-1])
    assert 4 <= done[-1] < STEPS
    assert status["last_durable_step"] == done[-1]
    assert not (run_dir / "export").exists()
    resumed = train(task, run_dir)
    assert resumed.returncode == 0, resumed.stdout
    assert [event["step"] for event in events(run_dir, "resume")] == [done[-1]]
    same_end(run_dir, unbroken)


@pytest.mark.slow
def test_sigkill_between_checkpoints_repeats_from_the_last_one(task: Path, unbroken: Path) -> None:
    run_dir = task.parent / "sigkill"
    often = "checkpoint.every_steps=3"
    killed = train(task, run_dir, often, meanwhile=when_step(run_dir, 5, signal_rank(1, signal.SIGKILL)))
    assert killed.returncode == 69, killed.stdout
    status, reached = RunFolder(run_dir).read_status(), steps(run_dir)[-1]
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 69, 1)
    assert "SIGKILL" in status["cause"]
    resumed = train(task, run_dir, often)
    assert resumed.returncode == 0, resumed.stdout
    continued_at = events(run_dir, "resume")[0]["step"]
    assert continued_at in (3, 6, 9)
    assert continued_at <= reached
    same_end(run_dir, unbroken)


@pytest.mark.slow
def test_the_stop_and_save_files(task: Path, unbroken: Path) -> None:
    run_dir = task.parent / "files"
    folder = RunFolder(run_dir)
    stopped = train(task, run_dir, meanwhile=when_step(run_dir, 2, lambda _: folder.stop_file.touch()))
    assert stopped.returncode == 0, stopped.stdout
    status = folder.read_status()
    assert status["state"] == "stopped"
    assert status["last_durable_step"] == status["step"] == steps(run_dir)[-1] < STEPS
    assert not folder.stop_file.exists()
    resumed = train(task, run_dir, meanwhile=when_step(run_dir, status["step"] + 2, lambda _: folder.save_file.touch()))
    assert resumed.returncode == 0, resumed.stdout
    saved = [event["step"] for event in events(run_dir, "checkpoint")]
    assert saved[0] == status["step"]
    assert saved[0] + 2 <= saved[1] < STEPS
    assert saved[2:] == [STEPS]
    assert not folder.save_file.exists()
    same_end(run_dir, unbroken)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["parallel.fsdp_size=1", "parallel.ep_size=1", "train.micro_batch_size=2"], "parallel.fsdp_size"),
        (["optim.lr=0.02"], "optim.lr"),
        (["train.grad_accum_steps=4"], "train.grad_accum_steps"),
    ],
)
def test_another_recipe_is_refused_in_one_line(task: Path, unbroken: Path, changes: list[str], named: str) -> None:
    before = exported_files(unbroken)
    refused = train(task, unbroken, *changes)
    assert refused.returncode == 64
    assert len(refused.stdout.splitlines()) == 1
    assert named in refused.stdout
    assert str(unbroken) in refused.stdout
    assert exported_files(unbroken) == before


def changed_model(task: Path, name: str, key: str, place: tuple[int, int], value: float) -> Path:
    """A copy of the task's model with one weight changed."""
    model = task.parent / name
    shutil.copytree(task.parent / "model", model)
    weights = load_file(model / "model.safetensors")
    weights[key][place] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def ended_with_17(run_dir: Path, output: str) -> dict:
    status = RunFolder(run_dir).read_status()
    assert (status["state"], status["exit_code"]) == ("failed", 17)
    assert "Traceback" not in output
    assert not (run_dir / "export").exists()
    assert not (run_dir / "export.tmp").exists()
    return status


def test_a_run_that_blows_up_ends_with_17_and_publishes_nothing(task: Path) -> None:
    run_dir = task.parent / "blown"
    ended = train(task, run_dir, "optim.lr=1e30", "optim.max_grad_norm=0", "checkpoint.every_steps=1")
    assert ended.returncode == 17, ended.stdout
    status = ended_with_17(run_dir, ended.stdout)
    assert "optim.lr" in status["cause"]
    assert 1 <= status["step"] == status["last_durable_step"] == len(steps(run_dir)) < STEPS


@pytest.mark.slow
def test_weights_that_the_last_step_spoilt_are_not_exported(task: Path) -> None:
    """A token that no row has: its embedding overflows in the last step, and no loss or gradient shows it."""
    unseen = AutoTokenizer.from_pretrained(task.parent / "model").convert_tokens_to_ids("Z")
    model = changed_model(task, "large", "model.embed_tokens.weight", (unseen, 0), 1e20)
    run_dir = task.parent / "spoilt"
    ended = train(task, run_dir, f"model.source={model}", "optim.weight_decay=1e22", "train.steps=1")
    assert ended.returncode == 17, ended.stdout
    assert "weights are not finite, so nothing was exported" in ended_with_17(run_dir, ended.stdout)["cause"]
    assert steps(run_dir) == [1]


def check_weights_of_one_spoilt_rank(run_dir: Path) -> None:
    model = nn.Linear(8, 8)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.weight[3, 4] = float("nan")
    folder = RunFolder(run_dir)
    run = SimpleNamespace(model=model, world=SimpleNamespace(rank=dist.get_rank()), step=7, folder=folder)
    with pytest.raises(NotFiniteError, match="step 7: weights are not finite, so nothing was exported"):
        check_weights(run)
    with torch.no_grad():
        model.weight.fill_(float("-inf") if dist.get_rank() == 0 else 1.0)
    with pytest.raises(NotFiniteError):
        check_weights(run)
    with torch.no_grad():
        model.weight.fill_(3e38)
    check_weights(run)


def test_one_spoilt_rank_refuses_the_export_on_all(tmp_path: Path) -> None:
    run_on_ranks(check_weights_of_one_spoilt_rank, 2, tmp_path)


@pytest.mark.slow
def test_poisoned_weights_end_the_first_step(task: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    model, run_dir = changed_model(task, "poisoned", name, (5, 7), float("nan")), task.parent / "poisoned-run"
    ended = train(task, run_dir, f"model.source={model}")
    assert ended.returncode == 17, ended.stdout
    ended_with_17(run_dir, ended.stdout)
    assert steps(run_dir) == []
    assert not list((run_dir / "ckpt").glob("step-*"))


def test_an_export_needs_neither_the_data_nor_the_optimizer(task: Path, unbroken: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "moved"
    shutil.copytree(unbroken, run_dir, symlinks=True)
    before = exported_files(run_dir)
    shutil.rmtree(run_dir / "export")
    shutil.rmtree(run_dir / "cache")
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["data"]["train"] = [str(tmp_path / "gone.jsonl")]
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "moe_recipes.launch.cli", "export", str(run_dir), "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert exported_files(run_dir) == before


def test_a_run_whose_checkpoints_are_gone_is_refused(task: Path, unbroken: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "emptied"
    shutil.copytree(unbroken, run_dir, symlinks=True)
    shutil.rmtree(run_dir / "ckpt")
    done = train(task, run_dir)
    assert done.returncode == 66, done.stdout
    assert f"no checkpoint, though step {STEPS} was saved" in done.stdout
