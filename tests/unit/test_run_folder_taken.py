"""One process at a time in a run folder on this host, and none beside a job of Slurm; what a host cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.operator.slurm import job_state, may_be_there
from moe_recipes.launch.slurm.lock import local_lock

HOLDER = """
import sys
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.slurm.lock import local_lock
with local_lock(RunFolder(sys.argv[1]), is_alive=lambda job: True):
    print("held", flush=True)
    sys.stdin.read()
"""
WITHOUT = "import sys; sys.modules[sys.argv.pop(1)] = None; from moe_recipes.launch.cli import main; sys.exit(main())"


def squeue(folder: Path, body: str) -> None:
    """A command of that name, first in PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "squeue").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "squeue").chmod(0o755)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = "another `moe-recipes train` or `export` works in this run folder"
        with pytest.raises(CannotWriteError, match=said), local_lock(RunFolder(tmp_path), is_alive=lambda job: True):
            pass
        holder.kill()
    with local_lock(RunFolder(tmp_path), is_alive=lambda job: True):
        pass


def test_a_scheduler_that_is_away_is_not_a_job_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    squeue(tmp_path / "bin", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    assert job_state("7") == ("UNKNOWN", "", "Slurm does not answer")
    squeue(tmp_path / "bin", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_state("7") is None


def test_a_job_of_slurm_has_the_folder_while_slurm_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    run.slurm.mkdir(parents=True)
    (run.slurm / "lock.json").write_text(json.dumps({"job": "7", "time": "2026-01-01T00:00:00Z"}))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for body in ("echo RUNNING", "echo 'Unable to contact slurm controller' >&2; exit 1"):
        squeue(tmp_path / "bin", body)
        said = r"job 7 works in this run folder since .*scancel 7"
        with pytest.raises(CannotWriteError, match=said), local_lock(run, is_alive=may_be_there):
            pass
    for body in ("exit 0", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"):
        squeue(tmp_path / "bin", body)
        with local_lock(run, is_alive=may_be_there):
            pass


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("torch", ("train", "tiny_slurm", "--set", "run_dir={run}", "--cpu"), " has no torch; run `make setup`"),
        ("torch", ("bench", "tiny_slurm", "--steps", "0"), " has no torch; run `make setup`"),
        ("huggingface_hub", ("prefetch", "qwen3_30b"), " has no huggingface_hub, which prefetch needs; run: "),
    ],
)
def test_a_python_without_a_package_is_one_line_and_78(
    tmp_path: Path, package: str, words: tuple[str, ...], said: str
) -> None:
    command = [sys.executable, "-c", WITHOUT, package, *(word.format(run=tmp_path / "run") for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done
    assert said in done.stderr
    assert not (tmp_path / "run" / "attempts").exists()


def test_an_answer_into_a_full_disk_is_one_line_and_73() -> None:
    command = [sys.executable, "-m", "moe_recipes.launch.cli", "show", "tiny_slurm"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2]
        )
    said = "moe-recipes: error: stdout: cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (73, said)
