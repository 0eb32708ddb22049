"""Signal lead, least walltime and hang limits, from the files that a run writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.config.cluster import Limits
from moe_recipes.config.errors import RecipeError
from moe_recipes.config.resolve import load_recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.slurm import timing
from moe_recipes.launch.slurm.timing import Times, check_walltime, estimated_times, hang_limit_s, signal_lead_s

ROOT = Path(__file__).resolve().parents[2]


def write_run(path: Path) -> RunFolder:
    """The lines that a trainer writes, times included."""
    folder = RunFolder(path)
    events = [
        {"time": "2026-01-01T00:00:00.000Z", "event": "start", "attempt": 1},
        {"time": "2026-01-01T00:01:30.000Z", "event": "first step", "step": 1, "step_s": 40.0},
        {"time": "2026-01-01T00:02:00.000Z", "event": "saving", "step": 2},
        {"time": "2026-01-01T00:02:30.000Z", "event": "checkpoint", "step": 2, "path": "x", "seconds": 30.0},
        {"time": "2026-01-01T00:03:00.000Z", "event": "checkpoint", "step": 3, "path": "x", "seconds": 25.5},
        {"time": "2026-01-01T01:00:00.000Z", "event": "start", "attempt": 2},
        {"time": "2026-01-01T01:00:50.000Z", "event": "resume", "step": 3, "path": "x"},
        {"time": "2026-01-01T01:01:00.000Z", "event": "first step", "step": 4, "step_s": 5.0},
        {"time": "2026-01-01T01:50:00.000Z", "event": "first step", "step": 5, "step_s": 5.0},  # ranks of torchrun
        {"time": "2026-01-01T02:00:00.000Z", "event": "start", "attempt": 3},
    ]
    path.mkdir(exist_ok=True)
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    steps = [
        {"step": 1, "loss": 1.0, "step_s": 40.0, "data_wait_s": 99.0, "expert_load": {"0": [1, 2]}},
        {"step": 2, "loss": 1.0, "step_s": 5.0, "data_wait_s": 0.1, "validation_loss": 1.0, "validation_s": 41.5},
        {"step": 3, "loss": 1.0, "step_s": 6.0, "data_wait_s": 0.1},
    ]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    folder.metrics.write_text(lines + '{"step": 4, "step_s": 1e9')  # being written
    return folder


def test_the_lead_is_60_s_the_longest_step_and_two_saves(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    folder.metrics.write_text(folder.metrics.read_text().rpartition("\n")[0] + "\n")
    assert signal_lead_s(folder) == 60.0 + 46.5 + 2 * 30.0
    measured = timing.measured_times(folder)
    assert measured == Times(startup_s=90.0, step_s=46.5, save_s=30.0)


def test_estimates_stand_in_until_something_was_measured(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert signal_lead_s(folder) == 60 + timing.DEFAULT_STEP_S + 2 * timing.DEFAULT_SAVE_S
    assert signal_lead_s(folder, Times(step_s=10.0, save_s=7.0)) == 84.0
    folder.append_event("checkpoint", step=1, seconds=2.0)
    assert signal_lead_s(folder, Times(step_s=10.0, save_s=7.0)) == 74.0
    folder.metrics.write_text('{"step": 1, "step_s": 3.0}\n')
    assert signal_lead_s(folder, Times(step_s=10.0, save_s=7.0)) == 67.0


def test_the_estimate_follows_the_bytes_of_the_model() -> None:
    recipe = load_recipe(str(ROOT / "recipes" / "qwen3_30b.yaml"), ())
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, source="package:qwen3_30b_a3b", revision=None)
    )
    one = estimated_times(recipe, Limits(checkpoint_gb_per_s=10.0), 1)
    assert one.save_s == pytest.approx(5 + 30.5e9 * 8 / 10e9, rel=0.01)
    assert one.startup_s == pytest.approx(30 + 30.5e9 * 2 / 10e9, rel=0.01)
    four = estimated_times(recipe, Limits(checkpoint_gb_per_s=10.0), 4)
    assert (four.save_s - 5) * 4 == pytest.approx(one.save_s - 5)


def test_a_walltime_that_holds_no_save_is_refused_with_the_one_that_does(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    folder.metrics.write_text('{"step": 1, "step_s": 40.0}\n')
    check_walltime(folder, None)
    check_walltime(folder, 160.0)
    with pytest.raises(RecipeError) as refused:
        check_walltime(folder, 159.0)
    assert str(refused.value) == (
        "the job ends in 159 s, but start-up (90 s), one step (40 s) and one save (30 s) take 160 s; ask for at least"
        " --time=00:04:00 (slurm.time of the cluster file)"
    )
    assert refused.value.exit_code == 64


def test_a_hang_is_measured_in_steps_and_waits_longer_for_starts_and_saves() -> None:
    limits, times = Limits(), Times(startup_s=2000.0, step_s=100.0, save_s=30.0)
    assert hang_limit_s(limits, times, "checkpoint") == 1000.0
    assert hang_limit_s(limits, Times(step_s=1.0), "first step") == 600.0
    assert hang_limit_s(Limits(hang_s=60.0), times, "first step") == 60.0
    assert hang_limit_s(Limits(hang_s=60.0), times, "start") == 6000.0
    assert hang_limit_s(limits, Times(), None) == limits.hang_start_s
    for event in ("saving", "exporting"):
        assert hang_limit_s(Limits(hang_s=60.0), times, event) == limits.hang_save_s
        assert hang_limit_s(limits, Times(save_s=9000.0), event) == 27000.0


def test_the_last_event_says_what_the_ranks_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert timing.last_event(folder) is None
    for event in ("start", "recipe changed", "first step", "saving"):
        folder.append_event(event)
    assert timing.last_event(folder) == "saving"
    folder.append_event("start", attempt=2)
    assert timing.last_event(folder) == "start"


def test_a_real_run_leaves_what_is_measured(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [f"run_dir={run}", "train.steps=3", "checkpoint.every_steps=2", "checkpoint.export=true"]
    overrides += ["parallel.fsdp_size=1", "parallel.ep_size=1", "data.format=random_tokens", "data.train=[]"]
    overrides += ["data.validation_fraction=0", "train.validate_every_steps=0", "log.wandb=off", "optim.warmup_steps=1"]
    words = [sys.executable, "-m", "moe_recipes.launch.cli", "train", str(ROOT / "recipes" / "tiny_cpu.yaml"), "--cpu"]
    words += [word for override in overrides for word in ("--set", override)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    saves = ["saving", "checkpoint"] * 2
    assert names == ["start", "first step", *saves, "exporting", "export", "done", "end"]
    times = timing.measured_times(RunFolder(run))
    assert times.save_s == max(event["seconds"] for event in events if event["event"] == "checkpoint")
    steps = [json.loads(line)["step_s"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert times.step_s == max(steps)
    assert times.startup_s > steps[0]
