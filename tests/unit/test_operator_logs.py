"""``logs``: which file is meant, what is printed, and that following goes on through attempts to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_recipes.launch.operator.logs import spans
from tests.unit.operator_runs import (
    ROOT,
    answered,
    real_run,
    refused,
    slurm_run,
    write_log,
    write_status,
    written_run,
)


def test_the_log_of_a_real_run_is_printed_byte_for_byte(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = real_run(tmp_path_factory.getbasetemp())
    for attempt in (1, 2):
        text = (run_dir / "attempts" / str(attempt) / "rank-00000.log").read_text()
        assert "step" in text
        assert answered("logs", str(run_dir), "--attempt", str(attempt)) == text
    assert answered("logs", str(run_dir)) == text, "the newest if none is given"
    assert answered("logs", str(run_dir), "-n", "2").splitlines() == text.splitlines()[-2:]


def test_rank_attempt_and_json(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    assert answered("logs", "4242", "--rank", "1", cwd=tmp_path) == "hello\nattempt 2\nrank 1 was here\n"
    assert answered("logs", "4242", "--attempt", "1", "-n", "1", cwd=tmp_path) == "rank 0 was here\n"
    assert json.loads(answered("logs", "4242", "-n", "1", "--json", cwd=tmp_path)) == {
        "log": str(folder.attempts / "2" / "rank-00000.log"),
        "attempt": 2,
        "rank": 0,
        "lines": ["rank 0 was here"],
    }
    write_log(folder, 2, 0, "half a li")
    assert answered("logs", "4242", cwd=tmp_path) == "half a li\n"
    folder.attempts.joinpath("2", "rank-00000.log").write_bytes(b"\xff\xfe\n")
    assert answered("logs", "4242", cwd=tmp_path) == "\ufffd\ufffd\n", "bytes that are no text stop nothing"


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    for rank in (2, 3, 7):
        write_log(folder, 2, rank, "")
    assert refused(66, "logs", str(folder.path), "--rank", "9") == (
        f"{folder.path}: attempt 2 has no log of rank 9; there are 0-3,7"
    )
    assert refused(66, "logs", str(folder.path), "--attempt", "5") == (
        f"{folder.path}: no logs of attempt 5; there are 1-2"
    )
    assert "at least 1" in refused(64, "logs", str(folder.path), "-n", "0")
    empty = written_run(tmp_path / "empty")
    assert refused(66, "logs", str(empty.path)) == f"{empty.path}: no attempt has written a log yet"
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "the condition did not come"
        time.sleep(0.05)


def test_following_goes_through_a_restart_and_ends_with_the_run(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    log = write_log(folder, 1, 0, "one\ntw")
    write_status(folder, "2026-01-01T00:00:00Z", state="running", step=1)
    said = tmp_path / "said"
    command = [sys.executable, "-m", "moe_recipes.launch.cli", "logs", str(folder.path), "-f"]
    with said.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for(lambda: said.read_text() == "one\n")
        with log.open("a") as file:
            file.write("o\nthree\n")
        wait_for(lambda: said.read_text() == "one\ntwo\nthree\n")
        write_status(folder, "2026-01-01T00:01:00Z", state="stopped", exit_code=75)
        with log.open("a") as file:
            file.write("saved\n")
        wait_for(lambda: said.read_text().endswith("saved\n"))
        write_log(folder, 2, 0, "again\n")
        wait_for(lambda: said.read_text().endswith("again\n"))
        assert process.poll() is None, "75 means that another attempt comes"
        write_log(folder, 2, 0, "again\nthe end")
        write_status(folder, "2026-01-01T00:02:00Z", state="done", exit_code=0)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert said.read_text() == "one\ntwo\nthree\nsaved\nagain\nthe end\n"


def test_following_ends_at_once_where_the_run_has_ended(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    write_log(folder, 1, 0, "one\ntwo")
    write_status(folder, "2026-01-01T00:02:00Z", state="failed", exit_code=17)
    assert answered("logs", str(folder.path), "-f") == "one\ntwo\n"
    assert [json.loads(line)["line"] for line in answered("logs", str(folder.path), "-f", "--json").splitlines()] == [
        "one",
        "two",
    ]
