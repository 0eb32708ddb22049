"""``why``: the first cause with rank, node, log and line, from the ledger and from a run without Slurm."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from moe_recipes.config.run_folder import RunFolder
from tests.ranks import runs
from tests.unit.operator_runs import RECIPE, answered, real_run, refused, slurm_run, write_log, written_run


def test_a_job_of_the_ledger_names_rank_node_log_and_line(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    for rank, code in ((0, 70), (1, -9)):
        record = {
            "rank": rank,
            "host": f"node{rank + 1}",
            "exit_code": code if code > 0 else None,
            "signal": None if code > 0 else 9,
            "time": f"2026-01-01T00:01:5{rank}.000Z",
        }
        (folder.attempts / "1" / f"rank-0000{rank}.exit.json").write_text(json.dumps(record))
    assert answered("why", "4242", cwd=tmp_path, PATH="/nonexistent") == (
        f"attempt   1 of {folder.path}: node_failure, exit 69\n"
        "cause     node2 went away\n"
        "rank      1\n"
        "node      node2\n"
        f"log       {folder.path}/attempts/1/rank-00001.log:3\n"
        "line      rank 1 was here\n"
        "followed  rank 0 failed after it\n"
        "next      requeued: node2 went away\n"
        "see       docs/runbook.md, a bad node\n"
    )
    answer = json.loads(answered("why", "4242", "--json", cwd=tmp_path))
    assert (answer["attempt"], answer["rank"], answer["line"], answer["next"]) == (1, 1, 3, "requeue")
    assert refused(66, "why", "4242", "--attempt", "2", cwd=tmp_path) == (
        f"{folder.path}: attempt 2 has not ended or never was; those that ended are 1"
    )


def test_a_run_folder_that_was_moved_is_still_explained(tmp_path: Path) -> None:
    folder = slurm_run(tmp_path / "runs" / "big")
    text = folder.slurm.joinpath("ledger.jsonl").read_text()
    folder.slurm.joinpath("ledger.jsonl").write_text(text.replace('"attempts/1/', f'"{folder.path}/attempts/1/'))
    folder.path.rename(tmp_path / "moved")
    answer = json.loads(answered("why", str(tmp_path / "moved"), "--json"))
    assert (answer["log"], answer["text"]) == (f"{tmp_path}/moved/attempts/1/rank-00001.log", "rank 1 was here")


def test_a_real_run_whose_newest_attempt_is_done_and_whose_first_was_stopped(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run_dir = real_run(tmp_path_factory.getbasetemp())
    assert answered("why", str(run_dir)) == f"attempt   2 of {run_dir}: done, exit 0\ncause     done\n"
    first = json.loads(answered("why", str(run_dir), "--attempt", "1", "--json"))
    assert (first["kind"], first["exit_code"], first["rank"]) == ("preempted", 75, 0)
    assert first["cause"].startswith("stopped by a signal after step ")
    log = (run_dir / "attempts" / "1" / "rank-00000.log").read_text().splitlines()
    assert log[first["line"] - 1] == first["text"]
    assert first["cause"] in first["text"]


@pytest.mark.slow
def test_a_rank_that_was_killed_is_named_and_not_the_one_that_missed_it(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    run_dir = tmp_path / "run"

    def kill(launcher: int) -> None:
        os.kill(runs.rank_pid(launcher, 1), signal.SIGKILL)

    done = runs.train(recipe, run_dir, meanwhile=runs.when_step(run_dir, 3, kill))
    assert done.returncode == 69, done.stdout
    answer = json.loads(answered("why", str(run_dir), "--json"))
    assert (answer["kind"], answer["exit_code"], answer["rank"]) == ("infrastructure", 69, 1)
    assert answer["cause"] == "rank 1 was killed by SIGKILL"
    assert answer["node"] == (RunFolder(run_dir).read_status() or {})["host"]


def test_nothing_has_ended(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "x")
    assert answered("why", str(folder.path)) == f"{folder.path}: no attempt has ended (state: not started)\n"
    assert json.loads(answered("why", str(folder.path), "--json"))["kind"] is None
    write_log(folder, 1, 0, "hello\n")
    assert "none has ended" in refused(66, "why", str(folder.path), "--attempt", "1")
