"""The trainer on real GPUs, through the command line: it learns, it resumes bit for bit, layouts agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU")]

RECIPE = """
name: gpu-test
model: {source: "package:tiny_qwen3_moe", weights: random, dtype: DTYPE}
data: {format: random_tokens, seq_len: 256}
optim: {name: OPTIM, lr: 1e-3, warmup_steps: 2}
train: {steps: 8, micro_batch_size: 2, deterministic: true}
log: {wandb: off}
"""


def train(folder: Path, *overrides: str, recipe: str = RECIPE, expect: int = 0) -> list[dict[str, object]]:
    """Run ``moe-recipes train`` and return its metrics."""
    dtype, optim = ("bfloat16", "flash_adamw") if "DTYPE" in recipe else ("", "")
    path = folder.parent / "gpu-test.yaml"
    path.write_text(recipe.replace("DTYPE", dtype).replace("OPTIM", optim))
    command = [sys.executable, "-m", "moe_recipes.launch.cli", "train", str(path), "--set", f"run_dir={folder}"]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(metrics: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics]


def test_resume_is_bit_for_bit_with_exact_master(tmp_path):
    whole = train(tmp_path / "whole", "checkpoint.export=false")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "STOP").touch()
    first = train(tmp_path / "parts", "checkpoint.export=false")
    assert len(first) < len(whole)
    assert not (tmp_path / "parts" / "STOP").exists()
    parts = train(tmp_path / "parts", "checkpoint.export=false")
    assert curve(parts) == curve(whole)


def test_export_loads_in_plain_transformers(tmp_path):
    train(tmp_path / "run")
    check = [sys.executable, "-m", "moe_recipes.models.check_export", str(tmp_path / "run")]
    done = subprocess.run(check, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_gpus_train_like_one(tmp_path, ep_size):
    recipe = RECIPE.replace("DTYPE", "float32").replace("OPTIM", "adamw")
    one = train(tmp_path / "one", "train.micro_batch_size=4", "checkpoint.export=false", recipe=recipe)
    layout = ("parallel.fsdp_size=2", f"parallel.ep_size={ep_size}", "checkpoint.export=false")
    two = train(tmp_path / "two", *layout, recipe=recipe)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
def test_two_gpus_with_experts_spread_resume_bit_for_bit(tmp_path):
    layout = ("parallel.fsdp_size=2", "parallel.ep_size=2", "checkpoint.export=false")
    whole = train(tmp_path / "whole", *layout)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "STOP").touch()
    train(tmp_path / "parts", *layout)
    assert not (tmp_path / "parts" / "STOP").exists()
    assert curve(train(tmp_path / "parts", *layout)) == curve(whole)
