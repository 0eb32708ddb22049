"""The operator's verbs on a job of a real Slurm, from the queue to the end, named by its job id alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.run_folder import prepare_run
from moe_recipes.launch.slurm.job_index import note_job
from tests.slurm.lab import Lab
from tests.slurm.supervised import ROOT, make_job

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

BODY = """
step(1)
print(f"rank {rank} of start {restart}", flush=True)
while not (got or folder.stop_file.exists()):
    time.sleep(0.05)
if got:
    save_and_leave(4)
save(8)
time.sleep(0.3)
leave(0, "stopped")
"""


def ask(lab: Lab, folder: Path, *words: str) -> dict[str, Any]:
    """The answer in JSON, or the error."""
    command = [sys.executable, "-m", "moe_recipes.launch.cli", *words, "--runs", str(folder), "--json"]
    environment = {**lab.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_job_is_answered_for_from_the_queue_to_the_end(lab: Lab, slurm_folder: Path) -> None:
    folder = slurm_folder / "operator"
    job = make_job(lab, folder, BODY)
    job.submit("--time=30", "--hold")
    note_job(folder, job.id, job.run.path)  # as `launch` does when it has submitted
    said = ask(lab, folder, "status", job.id)
    assert (said["exit_code"], said["error"]) == (
        66,
        f"job {job.id} has not started yet (JobHeldUser), and {job.run.path} holds no earlier start",
    )
    prepare_run(job.spec.read_recipe(), job.run)
    (folder / ".jobs" / job.id).unlink()  # the start of the job notes it again
    lab.run("scontrol", "release", job.id)
    job.wait_for_step(1)
    status = ask(lab, folder, "status", job.id)
    assert (status["state"], status["job_state"], status["nodes"]) == ("running", "RUNNING", ["node1", "node2"])
    assert (status["attempt"], status["restarts"], status["verdict"]) == (1, 0, None)

    lab.run("scancel", "--batch", "--signal=USR2", job.id)
    job.wait(lambda: job.ledger("requeue"))
    job.wait(lambda: lab.state_of(job.id) == "PENDING")
    waiting = ask(lab, folder, "status", job.id)
    assert (waiting["state"], waiting["job_state"], waiting["durable_step"]) == ("stopped", "PENDING", 4)
    assert (waiting["verdict"]["kind"], waiting["verdict"]["next"]) == ("preempted", "requeue")
    refused = ask(lab, folder, "stop", job.id)
    assert (refused["exit_code"], refused["error"]) == (
        64,
        f"{job.run.path} waits for job {job.id} to start again; to end it, run: scancel {job.id}",
    )

    job.wait(lambda: (job.run.read_status() or {}).get("state") == "running")
    job.wait(lambda: "of start 1" in "".join(ask(lab, folder, "logs", job.id, "--rank", "1").get("lines", [])))
    assert ask(lab, folder, "logs", job.id, "--attempt", "1")["lines"] == ["rank 0 of start 0", "told by SIGUSR2"]
    assert ask(lab, folder, "stop", job.id)["file"] == str(job.run.stop_file)
    assert lab.wait_for_end(job.id).state == "COMPLETED", job.output
    why = ask(lab, folder, "why", job.id)
    assert (why["attempt"], why["kind"], why["next"]) == (2, "done", None)
    assert why["cause"] == "stopped as asked by the file STOP; saved"
    first = ask(lab, folder, "why", job.id, "--attempt", "1")
    assert (first["kind"], first["exit_code"], first["next"]) == ("preempted", 75, "requeue")

    bundle = ask(lab, folder, "bundle", job.id)
    command = ["tar", "xzOf", str(folder / bundle["file"]), "--wildcards", "*/sacct.txt", "*/job-output.txt"]
    texts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "REQUEUED" in texts, "the accounting with its restarts"
    assert "moe-recipes: next: the job is requeued" in texts, "the supervisor's own lines"
