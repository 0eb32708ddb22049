"""Run folders for the tests of the operator's verbs: a real one of two ranks, and ones as the trainer writes them."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder, prepare_run
from moe_recipes.launch.slurm.job_index import note_job
from moe_recipes.launch.slurm.ledger import Ledger
from tests.ranks import runs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
RECIPE: dict[str, Any] = {
    "model": {"source": "package:tiny_qwen3_moe", "weights": "random", "dtype": "float32"},
    "parallel": {"fsdp_size": 2, "ep_size": 2},
    "data": {"format": "random_tokens", "seq_len": 64},
    "optim": {"lr": 0.001},
    "train": {"steps": STEPS, "activation_checkpointing": "none"},
    "checkpoint": {"every_steps": 25, "export": False},
    "log": {"wandb": "offline"},
}


@functools.cache
def empty_home() -> tempfile.TemporaryDirectory[str]:
    """A home without keys and caches, until these tests end."""
    return tempfile.TemporaryDirectory(prefix="operator-home-")


def call(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """``moe-recipes`` with these words, without what a Slurm, W&B or hub of this machine would add."""
    foreign = ("SLURM_", "WANDB_", "HF_", "MOE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return subprocess.run(
        [sys.executable, "-m", "moe_recipes.launch.cli", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "PYTHONPATH": str(ROOT), "HOME": empty_home().name, **environment},
    )


def answered(*words: str, cwd: Path = ROOT, **environment: str) -> str:
    done = call(*words, cwd=cwd, **environment)
    assert done.returncode == 0, done
    return done.stdout


def refused(code: int, *words: str, cwd: Path = ROOT, progress: bool = False, **environment: str) -> str:
    """The one line of a refusal, and that ``--json`` says the same. With ``progress`` something was done before it."""
    done = call(*words, cwd=cwd, **environment)
    assert done.returncode == code, done
    assert bool(done.stdout) == progress, done
    assert done.stderr.startswith("moe-recipes: error: ")
    assert done.stderr.count("\n") == 1
    said = done.stderr.removeprefix("moe-recipes: error: ").rstrip("\n")
    in_json = call(*words, "--json", cwd=cwd, **environment)
    assert in_json.returncode == code
    assert json.loads(in_json.stdout) == {"error": said, "exit_code": code}
    return said


def without_ages(text: str) -> str:
    return re.sub(r"\d+:\d\d:\d\d ago", "AGE ago", text)


@functools.cache
def real_run(base: Path) -> Path:
    """A run of two ranks that trained in two attempts: SIGTERM ended the first after some step, the second finished."""
    base = base / "operator"
    base.mkdir()
    recipe = base / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    run_dir = base / "runs" / "real"
    first = runs.train(recipe, run_dir, meanwhile=runs.when_step(run_dir, 3, lambda pid: os.kill(pid, signal.SIGTERM)))
    assert first.returncode == 75, first.stdout
    second = runs.train(recipe, run_dir)
    assert second.returncode == 0, second.stdout
    return run_dir


def written_run(place: Path, **changes: Any) -> RunFolder:
    """The folder of a run of 100 steps that has not reported yet."""
    recipe = {**RECIPE, "name": place.name, "train": {"steps": 100}, "checkpoint": {"every_steps": 10}, **changes}
    folder = prepare_run(recipe_from_dict(recipe), RunFolder(place))
    folder.update_manifest(time="2026-01-01T00:00:00Z", host="login")
    return folder


def write_steps(folder: RunFolder, last: int, *, step_s: float = 2.0) -> None:
    """metrics.jsonl as the trainer writes it, up to a step."""
    with folder.metrics.open("w") as file:
        for step in range(1, last + 1):
            record = {"step": step, "loss": 1 + 1 / step, "grad_norm": 0.5, "step_s": step_s, "data_wait_s": 0.1}
            file.write(json.dumps({**record, "expert_load": {"0": [step, 4]}}) + "\n")


def write_status(folder: RunFolder, time: str, **fields: Any) -> None:
    """status.json with a time of its own."""
    state = fields.pop("state")
    folder.write_status(state, **fields)
    status = json.loads(folder.status.read_text())
    folder.status.write_text(json.dumps({**status, "time": time}))


def write_event(folder: RunFolder, time: str, event: str, **fields: Any) -> None:
    with folder.events.open("a") as file:
        file.write(json.dumps({"time": time, "event": event, **fields}) + "\n")


def write_log(folder: RunFolder, attempt: int, rank: int, text: str) -> Path:
    path = folder.attempts / str(attempt) / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def slurm_run(place: Path, job: str = "4242") -> RunFolder:
    """A run that a supervisor started twice: node2 died in attempt 1, attempt 2 is running. Known by its job id."""
    folder = written_run(place)
    nodes = ["node1", "node2"]
    ledger, common = Ledger(folder), {"job": job, "nodes": nodes}
    ledger.append("start", restart=0, attempt=1, first_step=0, **common)
    ledger.append(
        "end",
        restart=0,
        attempt=1,
        exit_code=69,
        kind="node_failure",
        cause="node2 went away",
        rank=1,
        node="node2",
        log="attempts/1/rank-00001.log",
        line=3,
        first_step=0,
        durable_step=20,
        **common,
    )
    ledger.append("requeue", restart=0, attempt=1, reason="node2 went away", **common)
    ledger.append("start", restart=1, attempt=2, first_step=20, job=job, nodes=["node1", "node3"])
    _retime(ledger.path, ["00:01:00", "00:02:00", "00:02:01", "00:03:00"])
    write_steps(folder, 30)
    write_event(folder, "2026-01-01T00:01:50.000Z", "checkpoint", step=20, seconds=3.0)
    write_status(folder, "2026-01-01T00:04:00.000Z", state="running", step=30, last_durable_step=20, host="node1")
    for attempt in (1, 2):
        for rank in (0, 1):
            write_log(folder, attempt, rank, f"hello\nattempt {attempt}\nrank {rank} was here\n")
    (folder.path / "slurm" / job).mkdir(parents=True)
    note_job(place.parent, job, place)
    return folder


def _retime(path: Path, times: list[str]) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record, time in zip(records, times, strict=True):
        record["time"] = f"2026-01-01T{time}.000Z"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
