"""``stop`` and ``save``: the files that a real trainer acts on, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moe_recipes.config.run_folder import RunFolder
from tests.ranks import runs
from tests.unit.operator_runs import (
    RECIPE,
    answered,
    refused,
    slurm_run,
    write_status,
    write_steps,
    written_run,
)


def test_what_will_happen_is_said(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    stop, save = folder.stop_file, folder.save_file
    assert answered("stop", "4242", cwd=tmp_path) == (
        f"{stop}: the run saves in about 3 s at the end of its step (a step takes 2.0 s) and ends with exit code 0;"
        " it is not started again by itself, the next start continues it\n"
    )
    assert stop.is_file()
    assert answered("save", "4242", cwd=tmp_path) == (
        f"{save}: the run saves in about 3 s at the end of its step (a step takes 2.0 s) and goes on;"
        " it removes the file when the save is durable\n"
    )
    assert save.is_file()
    assert answered("stop", "4242", "--undo", cwd=tmp_path) == f"{stop}: removed; nothing is asked of the run\n"
    assert not stop.exists()
    answer = json.loads(answered("stop", "4242", "--undo", "--json", cwd=tmp_path))
    assert answer["said"] == f"{stop}: is not there; nothing was asked, or the run has acted on it"


def test_a_run_that_is_not_running_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    assert refused(64, "stop", str(folder.path)) == (
        f"{folder.path} is not running (state: not started); there is nothing to stop"
    )
    write_steps(folder, 3)
    for state in ("done", "failed", "stopped"):
        write_status(folder, "2026-01-01T00:02:00Z", state=state, exit_code=0)
        assert refused(64, "save", str(folder.path)) == (
            f"{folder.path} is not running (state: {state}); there is nothing to save"
        )
    assert not folder.stop_file.exists()
    assert not folder.save_file.exists()
    write_status(folder, "2026-01-01T00:02:00Z", state="starting")
    assert "after its first step" not in answered("stop", str(folder.path)), "it has trained before"


def test_a_job_that_waits_is_to_be_cancelled(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    write_status(folder, "2026-01-01T00:02:00Z", state="stopped", exit_code=75)
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'PENDING||BeginTime'\n")  # Slurm itself is in the tests of the lab
    squeue.chmod(0o755)
    said = refused(64, "stop", "4242", cwd=tmp_path, PATH=f"{squeue.parent}:/usr/bin:/bin")
    assert said == f"{folder.path} waits for job 4242 to start again; to end it, run: scancel 4242"


@pytest.mark.slow
def test_a_real_trainer_saves_and_stops_as_asked(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "train": {"steps": 100000}, "checkpoint": {"export": False}}))
    run_dir = tmp_path / "run"
    folder = RunFolder(run_dir)

    def act(pid: int) -> None:
        answered("save", str(run_dir))
        runs.when_step(run_dir, runs.steps(run_dir)[-1] + 5, lambda _: None)(pid)
        assert not folder.save_file.exists(), "the trainer takes the file away"
        assert "checkpoint" in [json.loads(line)["event"] for line in folder.events.read_text().splitlines()]
        answered("stop", str(run_dir))

    done = runs.train(recipe, run_dir, meanwhile=runs.when_step(run_dir, 2, act))
    assert done.returncode == 0, done.stdout
    status = folder.read_status() or {}
    assert (status["state"], status["step"]) == ("stopped", status["last_durable_step"])
    assert not folder.stop_file.exists()
    assert json.loads(answered("why", str(run_dir), "--json"))["cause"] == "stopped as asked by the file STOP; saved"
