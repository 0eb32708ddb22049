"""W&B gets a copy of the metrics and can do no harm: real wandb, offline; and replacements that break or hang."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_recipes.train import wandb_log
from moe_recipes.train.wandb_log import WandbLog, flat_numbers

OFFLINE = """
import sys
from pathlib import Path
from moe_recipes.train.wandb_log import WandbLog
log = WandbLog(Path(sys.argv[1]), mode="offline", project="p", name="n", config={})
log.log(int(sys.argv[2]), {"step": int(sys.argv[2]), "loss": 1.5})
log.close()
"""


def offline_runs(folder: Path) -> list[str]:
    """Run ids of the folders ``offline-run-DATE_TIME-ID``; a second one of the same second gets another ``-1``."""
    return [path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")]


def test_two_attempts_are_one_wandb_run(tmp_path):
    pytest.importorskip("wandb")
    for step in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path), step], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "wandb_id").read_text()
    assert offline_runs(tmp_path) == [run_id, run_id]


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> WandbLog:
    """A log over a module named wandb that misbehaves."""
    (tmp_path / "wandb.py").write_text(f"import time\nclass Settings:\n    def __init__(self, **k): pass\n{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return WandbLog(tmp_path, mode="offline", project="p", name="n", config={})


def test_a_wandb_that_raises_is_logged_and_ignored(tmp_path, monkeypatch, caplog):
    log = broken(tmp_path, monkeypatch, "def init(**k): raise RuntimeError('no disk')")
    log.log(1, {"loss": 1.0})
    log.close()
    assert "wandb stopped (no disk)" in caplog.text


def test_a_run_id_that_cannot_be_kept_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb_id").mkdir()
    log = broken(tmp_path, monkeypatch, "def init(**k): raise AssertionError('not reached')")
    log.log(1, {"loss": 1.0})
    log.close()
    assert "wandb stopped" in caplog.text
    assert "wandb_id" in caplog.text


def test_a_wandb_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_log, "CLOSE_TIMEOUT_S", 0.2)
    log = broken(tmp_path, monkeypatch, "def init(**k): time.sleep(30)")
    start = time.monotonic()
    log.log(1, {"loss": 1.0})
    log.close()
    assert time.monotonic() - start < 10
    assert "did not finish" in caplog.text


def test_off_starts_nothing(tmp_path):
    log = WandbLog(tmp_path, mode="off", project="p", name="n", config={})
    log.log(1, {"loss": 1.0})
    log.close()
    assert log.thread is None
    assert list(tmp_path.iterdir()) == []


def test_flat_numbers_name_every_expert_and_drop_what_is_no_number():
    record = {"loss": 1.0, "mfu": None, "expert_load": {3: [5, 0], "11": [2, 3]}}
    record |= {"max_violation": 0.5, "max_violation_of_layer": {3: 0.5}, "dead_experts_of_layer": {3: 1}}
    assert flat_numbers(record) == {
        "loss": 1.0,
        "max_violation": 0.5,
        "max_violation/layer_03": 0.5,
        "dead_experts/layer_03": 1,
        "expert_load/layer_03/expert_000": 5,
        "expert_load/layer_03/expert_001": 0,
        "expert_load/layer_11/expert_000": 2,
        "expert_load/layer_11/expert_001": 3,
    }
