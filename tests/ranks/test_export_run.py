"""``moe-recipes train`` and ``moe-recipes export``: a certificate for the export of a real run, and what ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks.runs import VOCAB_SIZE, train, write_task
from tests.tiny_models import tiny_config

STILL = ("optim.lr=1e-25", "optim.weight_decay=0.0", "train.steps=1")


def export_verb(run_dir: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "moe_recipes.launch.cli", "export", str(run_dir), "--cpu"]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    config = tiny_config("qwen3_moe")
    config.vocab_size = VOCAB_SIZE
    return write_task(tmp_path / "task", config, parallel={"ep_size": 2})


@pytest.mark.slow
def test_a_run_leaves_a_certified_export_and_the_verb_says_what_it_wrote(recipe: Path, tmp_path: Path) -> None:
    done = train(recipe, tmp_path / "run", "train.steps=2", "checkpoint.reload_export=true")
    assert done.returncode == 0, done.stdout
    again = export_verb(tmp_path / "run")
    assert again.returncode == 0, again.stdout
    for output in (done.stdout, again.stdout):
        lines = [line for line in output.splitlines() if line.startswith("export: ")]
        assert lines[0] == f"export: 69 tensors, 0.001 GiB, in 3 files -> {tmp_path / 'run' / 'export'}"
        assert lines[1] == "export: every byte read back; 16 experts, no two of them equal"
        assert lines[2].startswith("export: transformers agrees; vllm ")
        assert lines[3].startswith("export: reloaded: logits differ by ")
    record = json.loads((tmp_path / "run/export/EXPORT.json").read_text())
    assert record["logits"]["prompts"] == 4
    assert record["logits"]["mean_kl"] <= record["logits"]["bounds"]["mean_kl"] == 1e-6


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_before_the_first_step(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "task/model/model.safetensors"
    save_file({**load_file(path), "lm_head.bias": torch.ones(3)}, path, metadata={"format": "pt"})
    refused = train(recipe, tmp_path / "run", *STILL)
    assert refused.returncode == 74, refused.stdout
    assert "lm_head.bias is in the source and not in the model" in refused.stdout
    assert "step 1/1" not in refused.stdout
    assert "Traceback" not in refused.stdout


@pytest.mark.slow
def test_equal_experts_end_the_run_with_17(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "task/model/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in ("gate", "up", "down"):
        at = "model.layers.1.mlp.experts."
        tensors[f"{at}5.{name}_proj.weight"] = tensors[f"{at}2.{name}_proj.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    failed = train(recipe, tmp_path / "run", *STILL)
    assert failed.returncode == 17, failed.stdout
    assert "failed its certificate: model.layers.1.mlp.experts: experts 2 and 5 are equal" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert not (tmp_path / "run/export").exists()
    assert (tmp_path / "run/export.failed/EXPORT.json").is_file()
