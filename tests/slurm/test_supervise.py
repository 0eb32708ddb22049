"""The supervisor on a real Slurm: every end of a job, its cause in the ledger, and what follows from it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from moe_recipes.launch.slurm import excluded
from moe_recipes.launch.slurm.ledger import Ledger
from tests.slurm.lab import Lab
from tests.slurm.supervised import make_job, read_json

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SAVES_WHEN_TOLD = """
if restart > 0:
    step(8)
    save(8)
    leave(0, "done")
step(1)
step(4)
until_told(lambda: save_and_leave(4))
"""


@pytest.fixture
def folder(slurm_folder: Path, request: pytest.FixtureRequest) -> Path:
    return slurm_folder / f"supervise-{request.node.name[5:40]}"


def test_a_signal_saves_and_requeues_and_the_next_start_ends_the_job(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    job.wait_for_step(4)
    lab.run("scancel", "--batch", "--signal=USR2", job.id)
    record = lab.wait_for_end(job.id)
    assert (record.state, record.exit_code) == ("COMPLETED", "0:0"), job.output
    first, second = job.ledger("end")
    assert (first["kind"], first["exit_code"], first["first_step"], first["durable_step"]) == ("preempted", 75, 0, 4)
    assert (second["kind"], second["exit_code"], second["first_step"], second["durable_step"]) == ("done", 0, 4, 8)
    events = [record["event"] for record in job.ledger()]
    assert events == ["start", "signal", "end", "requeue", "start", "end"]
    assert [record["restart"] for record in job.ledger("start")] == [0, 1]
    assert job.states()[0] == "REQUEUED"
    assert "next: the job is requeued and goes on after step 4" in job.output
    ends = [read_json(path) for path in sorted((job.run.attempts / "1").glob("*.exit.json"))]
    assert [(end["rank"], end["exit_code"]) for end in ends] == [(0, 75), (1, 75)]
    assert not (job.run.slurm / "lock.json").exists()
    assert excluded.read(job.spec.cluster.excluded_nodes) == []


def test_an_error_of_the_user_is_the_exit_code_and_no_requeue(lab: Lab, folder: Path) -> None:
    body = """
step(1)
time.sleep(0.2)
print("moe-recipes: step 2: loss nan", flush=True)
leave(17, "failed", cause="step 2: loss nan", rank=0)
"""
    job = make_job(lab, folder, body).submit()
    record = lab.wait_for_end(job.id)
    assert (record.state, record.exit_code) == ("FAILED", "17:0"), job.output
    end = job.end()
    assert (end["kind"], end["cause"], end["rank"]) == ("not_finite", "step 2: loss nan", 0)
    assert Path(end["log"]).read_text().splitlines()[end["line"] - 1] == "moe-recipes: step 2: loss nan"
    assert len(job.states()) == 1


def test_a_killed_rank_requeues_without_its_node_and_a_crash_loop_is_held(lab: Lab, folder: Path) -> None:
    body = """
step(1)
if rank == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
    job = make_job(lab, folder, body, max_restarts_without_progress=1).submit()
    job.wait(lambda: job.ledger("hold"), 90)
    lab.wait_for_state(job.id, "PENDING")
    first, second = job.ledger("end")
    assert (first["kind"], first["exit_code"], first["rank"]) == ("infrastructure", 69, 1), job.output
    assert "killed by SIGKILL" in first["cause"]
    bad = job.ledger("start")[0]["nodes"][1]
    assert first["node"] == bad
    assert job.ledger("requeue")[0]["exclude"] == bad
    assert bad not in job.ledger("start")[1]["nodes"]
    assert second["rank"] == 1
    hold = job.ledger("hold")[0]
    assert hold["exit_code"] == 93
    assert "1 restarts without a newer durable step" in hold["reason"]
    assert lab.reason_of(job.id) == "job requeued in held state"
    shown = lab.run("scontrol", "show", "job", job.id).stdout
    assert "Comment=moe-recipes: 1 restarts without a newer durable step" in shown
    entries = excluded.read(job.spec.cluster.excluded_nodes)
    assert {entry.node for entry in entries} == {first["node"], second["node"]}
    assert all(entry.job == job.id and entry.expires > entry.time for entry in entries)


def test_a_hang_names_the_odd_rank_and_leaves_stacks(lab: Lab, folder: Path) -> None:
    body = """
def reading_a_bad_disk():
    time.sleep(600)
def waiting_for_the_others():
    time.sleep(600)
if restart > 0:
    step(2)
    save(2)
    leave(0, "done")
step(1)
reading_a_bad_disk() if rank == 1 else waiting_for_the_others()
"""
    job = make_job(lab, folder, body, nodes=3, hang_s=3).submit()
    job.wait(lambda: job.ledger("requeue"), 90)
    end, requeue = job.end(), job.ledger("requeue")[0]
    assert (end["kind"], end["exit_code"], end["rank"]) == ("hang", 70, 1), job.output
    assert "reading_a_bad_disk" in end["cause"]
    bad = job.ledger("start")[0]["nodes"][1]
    assert end["node"] == requeue["exclude"] == bad
    for rank in range(3):
        log = (job.run.attempts / "1" / f"rank-{rank:05d}.log").read_text()
        assert "Current thread" in log
        assert ("reading_a_bad_disk" in log) == (rank == 1)
    assert lab.wait_for_end(job.id).state == "COMPLETED"
    assert bad not in job.ledger("start")[1]["nodes"]


def test_a_cancelled_job_saves_and_stays_cancelled(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    job.wait_for_step(4)
    lab.run("scancel", job.id)
    job.wait(lambda: job.ledger("end"))
    assert (job.end()["kind"], job.end()["durable_step"]) == ("stopped_by_operator", 4), job.output
    assert lab.wait_for_end(job.id).state == "CANCELLED"
    assert job.ledger("requeue") == []


def test_the_time_limit_is_seen_coming(lab: Lab, folder: Path) -> None:
    body = SAVES_WHEN_TOLD.replace("step(4)\n", "save(1)\nstep(4)\n")
    job = make_job(lab, folder, body).submit("--time=3")
    job.wait_for_step(4)
    lab.run("scontrol", "update", f"jobid={job.id}", "EndTime=now+75")
    job.wait(lambda: job.ledger("requeue"), 90)
    assert (job.end()["kind"], job.end()["exit_code"]) == ("time_limit", 75), job.output
    assert "to the time limit; 60 s are needed" in job.ledger("signal")[0]["reason"]
    assert [job.rank_log(1, rank) for rank in range(2)] == ["told by SIGUSR2\n"] * 2  # SIGTERM would be Slurm's
    assert lab.wait_for_end(job.id).state == "COMPLETED"


def test_power_loss_of_the_batch_host_is_filed_by_the_next_start(lab: Lab, folder: Path) -> None:
    body = SAVES_WHEN_TOLD.replace("step(4)\n", "save(4)\n")
    job = make_job(lab, folder, body).submit()
    job.wait_for_step(4)
    bad = job.ledger("start")[0]["nodes"][0]
    lab.power_off(bad)
    try:
        record = lab.wait_for_end(job.id, 120)
    finally:
        lab.power_on(bad)
    assert record.state == "COMPLETED", job.output
    late, last = job.ledger("end")
    assert (late["kind"], late["node"], late["late"]) == ("node_failure", bad, True)
    assert late["slurm_state"] == "NODE_FAIL"
    assert (late["durable_step"], late["restart"]) == (4, 0)
    assert last["kind"] == "done"  # of start 2, or of a later one where Slurm tried the dead node once more
    assert last["restart"] >= 1
    assert [entry.node for entry in excluded.read(job.spec.cluster.excluded_nodes)] == [bad]


def test_a_lost_node_is_named_while_the_supervisor_lives(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    job.wait_for_step(4)
    bad = job.ledger("start")[0]["nodes"][1]
    lab.power_off(bad)
    try:
        record = lab.wait_for_end(job.id, 120)
    finally:
        lab.power_on(bad)
    assert record.state == "COMPLETED", job.output
    assert (job.ledger("end")[0]["kind"], job.ledger("end")[0]["node"]) == ("node_failure", bad)
    assert len(job.ledger("start")) == 2


def test_a_walltime_without_room_for_a_save_is_refused(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD)
    job.run.path.mkdir(parents=True)
    job.run.append_event("checkpoint", step=1, seconds=900.0)
    job.submit("--time=10")
    record = lab.wait_for_end(job.id)
    assert (record.state, record.exit_code) == ("FAILED", "64:0"), job.output
    assert job.end()["kind"] == "user_error"
    assert "one save (900 s)" in job.end()["cause"]
    assert "ask for at least --time=00:18:00" in job.output
    assert not list((job.run.attempts / "1").glob("rank-*"))


def test_a_second_job_on_the_run_folder_is_refused(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    job.wait_for_step(4)
    before = (job.run.path / "status.json").read_bytes(), len(job.ledger())
    second = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    record = lab.wait_for_end(second.id)
    assert (record.state, record.exit_code) == ("FAILED", "73:0")
    assert f"job {job.id} works in this run folder" in second.output
    assert second.output.count("\n") == 1
    assert before == ((job.run.path / "status.json").read_bytes(), len(job.ledger()))
    lab.run("scancel", job.id)
    lab.wait_for_end(job.id)
    # Its lock may be left behind; the job is gone, so a third one takes over.
    lock = {"job": job.id, "restart": 0, "host": "node1", "pid": 1, "time": "2026-01-01T00:00:00Z"}
    (job.run.slurm / "lock.json").write_text(json.dumps(lock))
    third = make_job(lab, folder, "step(9)\nleave(0, 'done')").submit()
    assert lab.wait_for_end(third.id).state == "COMPLETED", third.output


def test_a_requeue_waits_for_the_scheduler_to_come_back(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    job.wait_for_step(4)
    pid = read_json(job.run.slurm / "lock.json")["pid"]
    lab.slurmctld_stop()
    try:
        _signal_supervisor(job.id, pid)
        job.wait(lambda: (job.run.read_status() or {}).get("state") == "stopped")
        time.sleep(3)
    finally:
        lab.slurmctld_start()
    assert lab.wait_for_end(job.id, 120).state == "COMPLETED", job.output
    assert [end["kind"] for end in job.ledger("end")] == ["preempted", "done"]


def _signal_supervisor(job_id: str, pid: int) -> None:
    """The supervisor has number ``pid`` in its node only; here it is found by what it runs for."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                inside = (process / "status").read_text().split("NSpid:")[1].split("\n")[0].split()
            except (OSError, IndexError):
                continue
            if any(word.endswith(f"/slurm/{job_id}/spec.json".encode()) for word in words) and inside[-1] == str(pid):
                os.kill(int(process.name), signal.SIGUSR2)
                return
    raise AssertionError(f"no supervisor of job {job_id}")


def test_a_container_that_cannot_start_is_told_in_srun_s_words(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD)
    (folder / "python").unlink()
    job.submit()
    record = lab.wait_for_end(job.id)
    assert (record.state, record.exit_code) == ("FAILED", "66:0"), job.output
    assert "No such file" in job.end()["cause"]
    assert job.end()["log"].endswith("attempts/1/srun.log")


def test_a_preempted_job_saves_and_comes_back(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit("--time=30", "--exclusive")
    job.wait_for_step(4)
    urgent = lab.sbatch("--partition=high", "--nodes=4", "--exclusive", "--time=5", "--wrap=sleep 1")
    job.wait(lambda: job.ledger("requeue"))
    assert (job.end()["kind"], job.end()["durable_step"]) == ("preempted", 4), job.output
    assert lab.wait_for_end(urgent).state == "COMPLETED"
    assert lab.wait_for_end(job.id, 90).state == "COMPLETED"
    assert [end["kind"] for end in job.ledger("end")] == ["preempted", "done"]


def test_a_signal_to_one_rank_alone_is_enough_to_requeue(lab: Lab, folder: Path) -> None:
    body = SAVES_WHEN_TOLD.replace("step(4)\n", "step(4)\nif rank == 1:\n    got.append(0)\n")
    job = make_job(lab, folder, body.replace("until_told", "if rank == 0: got.append(0)\nuntil_told")).submit()
    assert lab.wait_for_end(job.id).state == "COMPLETED", job.output
    first, second = job.ledger("end")
    assert (first["kind"], first["cause"]) == ("preempted", "stopped by a signal after step 4; saved after step 4")
    assert second["kind"] == "done"
    assert job.ledger("signal") == []


def test_the_probe_is_asked_once_and_needs_no_run(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, "", tasks=2, work="probe").submit()
    record = lab.wait_for_end(job.id)
    assert (record.state, record.exit_code) == ("COMPLETED", "0:0"), job.output
    attempt = job.run.attempts / "1"
    places = [read_json(path) for path in sorted(attempt.glob("probe-*.json"))]
    assert [place["rank"] for place in places] == [0, 1, 2, 3]
    assert [place["host"] for place in places] == [node for node in job.ledger("start")[0]["nodes"] for _ in range(2)]
    assert job.run.read_status() is None
    told = read_json(attempt / "job.json")
    assert (told["job"], told["restart"], told["nodes"]) == (job.id, 0, job.ledger("start")[0]["nodes"])


def test_a_limit_that_kills_the_ranks_still_leaves_a_verdict_and_a_requeue(lab: Lab, folder: Path) -> None:
    body = """
if restart > 0:
    leave(0, "done")
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
step(1)
save(1)
time.sleep(600)
"""
    job = make_job(lab, folder, body).submit("--time=3")
    job.wait_for_step(1)
    lab.run("scontrol", "update", f"jobid={job.id}", "EndTime=now+5")
    job.wait(lambda: job.ledger("requeue"), 120)
    assert (job.end()["kind"], job.end()["exit_code"]) == ("time_limit", 75), job.output
    assert lab.wait_for_end(job.id).state == "COMPLETED"
    assert [end["kind"] for end in job.ledger("end")] == ["time_limit", "done"]


def test_the_restart_count_of_the_submitting_shell_is_not_the_jobs(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD)
    leaked = {"SLURM_RESTART_COUNT": "1"}
    job.id = lab.sbatch("--nodes=2", "--ntasks-per-node=1", "--time=30", folder / "batch.sh", env=leaked)
    job.wait_for_step(4)
    lab.run("scancel", "--batch", "--signal=USR2", job.id)
    assert lab.wait_for_end(job.id).state == "COMPLETED", job.output
    assert [(end["kind"], end["restart"]) for end in job.ledger("end")] == [("preempted", 0), ("done", 1)]


def test_a_signal_for_stacks_ends_no_supervisor(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, SAVES_WHEN_TOLD).submit()
    job.wait_for_step(4)
    lab.run("scancel", "--full", "--signal=USR1", job.id)
    job.wait(lambda: "Current thread" in job.rank_log(1, 0))
    lab.run("scancel", "--batch", "--signal=USR2", job.id)
    assert lab.wait_for_end(job.id).state == "COMPLETED", job.output
    assert [end["kind"] for end in job.ledger("end")] == ["preempted", "done"]


def test_a_probe_files_no_end_of_another_job(lab: Lab, folder: Path) -> None:
    job = make_job(lab, folder, "", work="probe")
    Ledger(job.run).append("start", job="1", restart=0, attempt=1, nodes=["node1"])
    job.submit()
    assert lab.wait_for_end(job.id).state == "COMPLETED", job.output
    assert [end["job"] for end in job.ledger("end")] == [job.id]
