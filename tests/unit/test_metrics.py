"""The line for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_recipes.train.metrics import Metrics


@pytest.mark.parametrize(
    ("step_s", "total", "left"), [(2.0, 11, "00:00:20"), (3.6, 1001, "01:00:00"), (86.4, 3001, "72:00:00")]
)
def test_time_left_does_not_wrap_after_a_day(tmp_path: Path, step_s: float, total: int, left: str) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", first_step=0, total_steps=total)
    record = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s_per_gpu": 1.0, "step_s": step_s}
    line = metrics.line(record | {"gpu": False, "mfu": None})
    metrics.close()
    assert line.endswith(f"left {left}")
