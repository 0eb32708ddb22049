"""The ledger and the lock of a run folder: appended, torn, read again, and one job at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.slurm.ledger import Ledger, durable_step
from moe_recipes.launch.slurm.lock import run_lock


def add(ledger: Ledger, event: Any, restart: int = 0, **fields: Any) -> dict[str, Any]:
    return ledger.append(event, job="7", restart=restart, attempt=restart + 1, nodes=("node1",), **fields)


def test_records_come_back_in_order_with_time_and_host(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(tmp_path / "run"))
    assert ledger.records() == []
    written = [add(ledger, "start", first_step=0), add(ledger, "end", kind="done", cause='a "quoted"\nline')]
    assert Ledger(RunFolder(tmp_path / "run")).records() == written
    assert len(ledger.path.read_text().splitlines()) == 2
    assert all(record["host"] == os.uname().nodename and record["time"].endswith("Z") for record in written)
    assert {"job": "7", "restart": 0, "attempt": 1, "nodes": ["node1"]}.items() <= written[0].items()


def test_half_a_line_of_a_power_loss_costs_only_itself(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(tmp_path))
    first = add(ledger, "start")
    whole = ledger.path.read_bytes()
    for cut in range(1, len(whole)):
        ledger.path.write_bytes(whole + whole[:cut])
        second = add(ledger, "end")
        records = ledger.records()
        assert records[0] == first
        assert records[-1] == second
        # All but the newline is a whole record.
        assert len(records) == (3 if cut == len(whole) - 1 else 2), cut


def test_a_start_without_an_end_is_unfinished(tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(tmp_path))
    add(ledger, "start", restart=0)
    add(ledger, "end", restart=0)
    lost = add(ledger, "start", restart=1)
    add(ledger, "start", restart=2)
    add(ledger, "signal", restart=1)
    add(ledger, "end", restart=2)
    assert ledger.unfinished() == [lost]


def test_a_ledger_that_cannot_be_written_is_one_line_and_73(tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("a file where the folder should be")
    with pytest.raises(CannotWriteError, match=r"ledger.jsonl: cannot be written: (File exists|Not a directory)"):
        add(Ledger(RunFolder(tmp_path)), "start")


def test_the_durable_step_is_that_of_the_status(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert durable_step(folder) == 0
    folder.write_status("running", step=7, last_durable_step=4)
    folder.write_status("failed", exit_code=17)
    assert durable_step(folder) == 4


def test_a_live_job_keeps_its_run_folder_and_a_dead_one_does_not(tmp_path: Path) -> None:
    folder, asked = RunFolder(tmp_path), []

    def answers(alive: bool) -> Any:
        return lambda job: (asked.append(job), alive)[1]

    with run_lock(folder, "7", 0, is_alive=answers(True)):
        with (
            pytest.raises(CannotWriteError, match="job 7 works in this run folder since"),
            run_lock(folder, "8", 0, is_alive=answers(True)),
        ):
            pass
        with run_lock(folder, "7", 1, is_alive=answers(True)):  # its own next start
            assert json.loads((folder.slurm / "lock.json").read_text())["restart"] == 1
    assert asked == ["7"]
    (folder.slurm / "lock.json").write_text(json.dumps({"job": "9", "time": "then"}))
    with run_lock(folder, "8", 0, is_alive=answers(False)):
        assert json.loads((folder.slurm / "lock.json").read_text())["job"] == "8"
    assert asked == ["7", "9"]
    (folder.slurm / "lock.json").write_text("{dama")
    with run_lock(folder, "8", 0, is_alive=answers(True)):
        pass
    assert [path.name for path in folder.slurm.iterdir()] == [".lock.json.guard"]


def _slow_answer(job: str) -> bool:
    time.sleep(0.1)  # as the scheduler's: time enough for all to see the same stale lock
    return job != "stale"


def _try(folder: str, job: str, barrier: Any, won: Any) -> None:
    barrier.wait()
    try:
        with run_lock(RunFolder(folder), job, 0, is_alive=_slow_answer):
            won.put(job)
            barrier.wait()
    except CannotWriteError:
        barrier.wait()


def test_of_many_jobs_one_gets_a_stale_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        (tmp_path / "slurm").mkdir(exist_ok=True)
        (tmp_path / "slurm" / "lock.json").write_text(json.dumps({"job": "stale", "time": "then"}))
        barrier, won = context.Barrier(4), context.Queue()
        jobs = [context.Process(target=_try, args=(str(tmp_path), str(n), barrier, won)) for n in range(4)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(timeout=20)
        assert [job.exitcode for job in jobs] == [0] * 4
        won.get(timeout=5)
        assert won.empty()
