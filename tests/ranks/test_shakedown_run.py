"""A shakedown as two starts of the trainer: one rank dies after the save, the next start resumes and exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moe_recipes.config.errors import EXIT_INFRASTRUCTURE
from moe_recipes.config.resolve import dump, load_recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.shakedown import KILL_VARIABLE, checks, kill_environment, shakedown_recipe, write_verdict
from tests.ranks.runs import command, records


def start(recipe: Path, folder: RunFolder, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    words = command(recipe, folder.path)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_rank_dies_once_and_the_second_start_ends_with_a_verdict(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "tiny-shakedown")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump(shakedown_recipe(load_recipe("nemotron_ultra_550b"), narrow=True, num_ranks=2)))

    kill = kill_environment(folder, num_ranks=2, job_id=12345)
    first = start(recipe, folder, **kill)
    assert first.returncode == EXIT_INFRASTRUCTURE, first.stdout + first.stderr
    assert f"rank {kill[KILL_VARIABLE][0]} was killed by SIGKILL" in first.stderr
    assert [record["step"] for record in records(folder.path)] == [1, 2]
    assert not write_verdict(folder)
    failed = [check.name for check in checks(folder) if not check.passed]
    assert failed == ["trained", "saved", "requeued", "resumed", "exported", "done"]

    assert kill_environment(folder, num_ranks=2, job_id=12345) == {}
    second = start(recipe, folder)
    assert second.returncode == 0, second.stdout + second.stderr
    assert write_verdict(folder), (folder.path / "shakedown.json").read_text()
    assert [record["step"] for record in records(folder.path)] == [1, 2, 3]

    words = [sys.executable, "-m", "moe_recipes.models.check_export", str(folder.path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.export, dtype=torch.float32)
    assert model.config.layers_block_type == ["linear_attention", "moe", "full_attention"]
    assert json.loads((folder.export / "config.json").read_bytes())["hidden_size"] == 64
