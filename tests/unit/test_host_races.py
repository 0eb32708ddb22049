"""The host side where another host is quicker, files come late, clocks stand still, or a disk is full."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.cluster import Limits
from moe_recipes.config.errors import CannotWriteError, CorruptCheckpointError
from moe_recipes.config.run_folder import RunFolder, write_json
from moe_recipes.launch.cli import main
from moe_recipes.launch.slurm import excluded
from moe_recipes.launch.slurm.after import wait_for_endings
from moe_recipes.launch.slurm.commands import JobFacts
from moe_recipes.launch.slurm.inside import notes
from moe_recipes.launch.slurm.job import run_job
from moe_recipes.launch.slurm.job_index import note_job, run_of_job
from moe_recipes.launch.slurm.ledger import Ledger
from moe_recipes.launch.slurm.lock import run_lock
from moe_recipes.launch.slurm.policy import restarts_without_progress
from moe_recipes.launch.slurm.spec import JobSpec, write_spec
from moe_recipes.launch.slurm.stacks import log_sizes, new_stacks
from moe_recipes.launch.slurm.timing import Times
from moe_recipes.launch.slurm.watch import Signals, Watch
from tests.unit.test_slurm_scripts import facts, site, spec_of

__all__ = ["site"]  # a fixture
TIMES = Times(startup_s=30.0, step_s=30.0, save_s=250.0)
"""A signal's lead of 590 s."""


@pytest.fixture
def spec(site: Path) -> JobSpec:
    return spec_of(site)


def watch_of(folder: Path, process: Any, *, left_s: float = 1e6, hang_s: float = 6.0) -> Watch:
    """A watch whose srun is ``process`` and whose job ends in ``left_s`` seconds."""
    run = RunFolder(folder)
    attempt = run.new_attempt()
    job: JobFacts = facts(start_time=time.time(), end_time=time.time() + left_s, time_limit_s=int(left_s))
    watch = Watch(
        process=process,
        folder=run,
        attempt=attempt,
        job=job,
        limits=Limits(hang_s=hang_s),
        estimate=TIMES,
        signals=Signals(),
        note=lambda what, reason: None,
        may_hang=True,
    )
    watch._measure()
    watch._marks, watch._still_s, watch._looked = watch._progress(), 0.0, time.monotonic()
    return watch


@pytest.fixture
def sleeper() -> Any:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_ranks_that_still_start_are_not_told_of_a_limit_that_holds_a_step_and_a_save(
    tmp_path: Path, sleeper: Any
) -> None:
    watch = watch_of(tmp_path, sleeper, left_s=480)
    watch.folder.append_event("start", attempt=1)
    watch._mind_the_limit()
    assert watch.asked is None
    watch.folder.append_event("first step", step=1)
    watch._mind_the_limit()
    assert (watch.asked, sleeper.wait(10)) == ("time_limit", -signal.SIGUSR2)


def test_ranks_that_still_start_are_told_before_it_is_too_late_for_a_save(tmp_path: Path, sleeper: Any) -> None:
    watch = watch_of(tmp_path, sleeper, left_s=270)
    watch._mind_the_limit()
    assert watch.asked == "time_limit"


def test_a_job_that_was_suspended_does_not_hang(tmp_path: Path, sleeper: Any) -> None:
    watch = watch_of(tmp_path, sleeper, hang_s=15)
    watch.folder.append_event("first step", step=1)
    watch._marks = watch._progress()
    watch._mind_progress(time.monotonic() + 3600)
    assert watch.asked is None
    watch._still_s = 15.0
    watch._end_hang = lambda reason: setattr(watch, "asked", "hang")  # type: ignore[method-assign]
    watch._mind_progress(time.monotonic() + 3606)
    assert watch.asked == "hang"


def test_the_ranks_are_told_though_the_ledger_takes_no_line(tmp_path: Path, sleeper: Any) -> None:
    watch = watch_of(tmp_path, sleeper)

    def full(what: str, reason: str) -> None:
        raise CannotWriteError("no space left")

    watch.note = full
    with pytest.raises(CannotWriteError):
        watch._stop_ranks("signal", "somebody asked")
    assert sleeper.wait(10) == -signal.SIGUSR2


def test_a_log_that_cannot_be_read_is_a_rank_that_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.log").symlink_to(tmp_path / "rank-00000.log")  # the system's error: too many links
    (tmp_path / "rank-00001.log").write_text("words\n")
    assert log_sizes(tmp_path) == {1: 6}
    assert new_stacks(tmp_path, {}) == {0: None, 1: None}


def test_endings_that_come_late_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text("srun: error: node2: task 5: Exited with exit code 65\n")
    ending = {"rank": 5, "host": "node2", "exit_code": 65, "signal": None, "time": "2026-01-01T00:00:00Z"}
    timer = threading.Timer(1.5, write_json, (tmp_path / "rank-00005.exit.json", ending))
    timer.start()
    start = time.monotonic()
    wait_for_endings(tmp_path, 65, stop=lambda: False)
    assert (tmp_path / "rank-00005.exit.json").exists()
    wait_for_endings(tmp_path / "nothing", 1, stop=lambda: False)  # srun named no task
    wait_for_endings(tmp_path / "nothing", 0, stop=lambda: True)
    timer.join()
    assert time.monotonic() - start < 30


def test_a_task_waits_for_a_spec_that_its_node_does_not_see_yet(spec: JobSpec, tmp_path: Path) -> None:
    place, attempt = tmp_path / "spec.json", tmp_path / "attempts" / "1"
    words = [sys.executable, "-m", "moe_recipes.launch.slurm.task", str(place), str(attempt)]
    task = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    time.sleep(2)
    attempt.mkdir(parents=True)
    write_spec(place, spec)
    said = task.communicate(timeout=60)[1]
    assert task.returncode == 69, said
    assert "did not reach the task" in said, "it came as far as the variables of srun"


def _make_attempts(path: Path, number: int) -> None:
    for _ in range(number):
        RunFolder(path).new_attempt()


def test_two_starts_at_once_get_attempts_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_make_attempts, args=(tmp_path, 400)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len([path for path in (tmp_path / "attempts").iterdir() if path.name.isdigit()]) == 1200


def _note_many(runs: Path, number: int) -> None:
    for _ in range(number):
        note_job(runs, "7", runs / "a")


def test_launch_and_its_job_may_note_the_job_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_note_many, args=(tmp_path, 1500)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert run_of_job(tmp_path, "7") == tmp_path / "a"


def test_an_event_is_not_glued_to_half_a_line_of_a_power_loss(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event("first step", step=1)
    with folder.events.open("ab") as file:
        file.write(b'{"time": "2026-01-0')
    folder.append_event("start", attempt=2)
    assert json.loads(folder.events.read_text().splitlines()[-1])["event"] == "start"


def test_a_folder_that_is_a_file_is_one_line_and_73(tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("")
    with pytest.raises(CannotWriteError, match=r"lock\.json: cannot be written"):
        run_lock(RunFolder(tmp_path), "7", 0, is_alive=lambda job: False).__enter__()
    with pytest.raises(CannotWriteError, match=r"x\.json: cannot be written"):
        write_json(tmp_path / "slurm" / "x.json", {})


def test_a_start_that_two_hosts_filed_counts_once() -> None:
    def end(restart: int) -> dict[str, Any]:
        return {"event": "end", "job": "7", "restart": restart, "attempt": restart + 1}

    assert restarts_without_progress([end(0), end(1), {**end(1), "late": True}]) == 1


@pytest.mark.parametrize(
    "text", ["{", '{"nodes": [{"node": "n1", "reason": "", "job": "7", "time": "", "expires": null}]}']
)
def test_somebodys_edit_of_the_list_of_bad_nodes_ends_no_job(spec: JobSpec, tmp_path: Path, text: str) -> None:
    paths = {"runs": str(tmp_path)}
    from dataclasses import replace

    cluster = replace(spec.cluster, paths=replace(spec.cluster.paths, **paths))
    own = replace(spec, cluster=cluster)
    own.cluster.excluded_nodes.write_text(text)
    with pytest.raises(CorruptCheckpointError):
        excluded.read(own.cluster.excluded_nodes)
    assert "remove it to use all nodes again" in "".join(notes(own, own.cluster, facts()))


def test_a_submission_whose_spec_is_gone_ends_with_66_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as ended:
        run_job(str(tmp_path / ".spec-1.json"))
    assert ended.value.code == 66
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_on_a_full_disk_does_not_hide_the_exit_code() -> None:
    code = "import sys; from moe_recipes.launch.slurm.supervise import supervise; sys.exit(supervise('/nonexistent'))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-u", "-c", code], stdout=full, stderr=full)
    assert done.returncode == 66


def test_the_job_has_the_umask_of_its_user(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\numask >{tmp_path}/umask\necho Submitted batch job 7\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    text = site.read_text().replace("/shared/runs", str(tmp_path / "runs"))
    site.write_text(text)
    before = os.umask(0o027)
    try:
        assert main(["launch", "tiny_slurm", "--cluster", str(site)]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "umask").read_text().strip() == "0027"
    folder = tmp_path / "runs" / "tiny_slurm" / "slurm"
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in (folder / "7" / "7_submitted.pkl", folder / "7" / "7_submission.sh", *folder.glob(".spec-*")):
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_the_job_of_a_run_is_the_one_that_trains(tmp_path: Path) -> None:
    from moe_recipes.launch.operator.facts import RunFacts

    ledger = Ledger(RunFolder(tmp_path))
    for job, attempt, work in (("7", 1, "train"), ("8", 2, "preflight"), ("9", 3, "export")):
        ledger.append("start", job=job, restart=0, attempt=attempt, nodes=[f"node{attempt}"], work=work)
    found = RunFacts(RunFolder(tmp_path))
    assert (found.job, found.attempts, found.nodes) == ("7", [1], ["node1"])
