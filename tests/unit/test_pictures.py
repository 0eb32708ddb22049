"""Pictures of metrics: the numbers that are drawn, and files that are really pictures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_recipes.bench import pictures
from moe_recipes.config.errors import DataError, MissingInputError

ROOT = Path(__file__).resolve().parents[2]


def write_metrics(folder: Path, num_steps: int = 30, num_layers: int = 3, num_experts: int = 4) -> Path:
    lines = []
    for step in range(1, num_steps + 1):
        record = {"step": step, "loss": 8 / step, "lr": 1e-3, "max_violation": 1 / step}
        if step % 5 == 0:
            record["expert_load"] = {str(layer): list(range(num_experts)) for layer in range(num_layers)}
            record["validation_loss"] = 9 / step
        lines.append(json.dumps(record))
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def size_of_png(path: Path) -> tuple[int, int]:
    from matplotlib.image import imread

    image = imread(path)
    assert image.std() > 0.02  # something is drawn
    return image.shape[1], image.shape[0]


def test_both_pictures_are_drawn(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path)
    pictures.loss_curve(metrics, tmp_path / "loss.png", resumed_at=[10, 20])
    pictures.expert_heat_map(metrics, tmp_path / "heat.png")
    assert size_of_png(tmp_path / "loss.png") == (1200, 750)
    assert size_of_png(tmp_path / "heat.png") == (1350, 1050)


def test_a_large_model_and_one_record_are_drawn_too(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path, num_steps=5, num_layers=48, num_experts=128)
    pictures.expert_heat_map(metrics, tmp_path / "heat.png")
    assert size_of_png(tmp_path / "heat.png") == (1350, 1050)


def test_shares_and_means_are_right() -> None:
    assert pictures.log2_shares([4, 2, 2, 0]) == [1.0, 0.0, 0.0, -math.inf]
    assert pictures.log2_shares([0, 0]) == [-math.inf, -math.inf]
    values = [3.0, 5.0, 1.0]
    weights = [[0.9 ** (i - j) for j in range(i + 1)] for i in range(3)]
    assert pictures.running_mean(values) == pytest.approx(
        [float(np.average(values[: i + 1], weights=weights[i])) for i in range(3)]
    )
    assert pictures.shown_layers(range(48)) == [0, 7, 13, 20, 27, 34, 40, 47]
    assert pictures.shown_layers([3, 1]) == [1, 3]


def test_bad_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="give the folder of a run"):
        pictures.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record of one step"):
        pictures.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(DataError, match=r"expert_load_every_steps"):
        pictures.expert_heat_map(tmp_path / "metrics.jsonl", tmp_path / "x.png")


def test_the_module_draws_a_run_and_says_when_matplotlib_is_missing(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    events = [{"event": "start"}, {"event": "checkpoint", "step": 9}, {"event": "resume", "step": 10}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert pictures.resume_steps(tmp_path / "events.jsonl") == [10]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "moe_recipes.bench.pictures", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "loss_curve.png"), str(tmp_path / "expert_heat_map.png")]
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "matplotlib.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment, "PYTHONPATH": f"{blocked}:{ROOT}"}
    )
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    assert "pip install matplotlib" in done.stderr
