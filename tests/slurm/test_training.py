"""Expert-parallel training in the container on two nodes: whole, and told to stop in each way a cluster does it."""

from __future__ import annotations

import json
import math
import shutil
import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.slurm.site import JOB_S, Run, Site, expand, reaches_step, signal_rank

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_launch_trains_saves_and_exports(undisturbed: Run, records: Path, image: Path) -> None:
    assert undisturbed.status["state"] == "done"
    assert undisturbed.endings[0]["kind"] == "done"
    losses = [record["loss"] for record in undisturbed.lines("metrics.jsonl")]
    assert len(losses) == 30
    assert all(math.isfinite(loss) for loss in losses)
    assert undisturbed.durable_steps() == [10, 20, 30]
    assert (undisturbed.path / "export/config.json").exists()
    assert all(weights.stat().st_size > 0 for weights in undisturbed.path.glob("export/*.safetensors"))
    assert list(undisturbed.path.glob("export/*.safetensors"))
    ends = [json.loads(path.read_text()) for path in sorted(undisturbed.path.glob("attempts/1/rank-*.exit.json"))]
    assert [(end["rank"], end["exit_code"]) for end in ends] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert ends[0]["host"] == ends[1]["host"] != ends[2]["host"] == ends[3]["host"]
    assert len(list(undisturbed.path.glob("attempts/1/rank-*.log"))) == 4
    assert (undisturbed.path / "attempts/latest").resolve().name == "1"
    job = undisturbed.endings[0]["job"]
    assert all(f"container-image={image}\n" in (records / f"{job}.0.{rank}").read_text() for rank in range(4))


def test_the_export_script_writes_the_same_files_again(undisturbed: Run, site: Site) -> None:
    weights = {path.name: path.read_bytes() for path in undisturbed.path.glob("export/*.safetensors")}
    shutil.rmtree(undisturbed.path / "export")
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    job = site.script("export", str(undisturbed.path), options=options)
    site.lab.wait_for_state(job, "COMPLETED", JOB_S)
    again = {path.name: path.read_bytes() for path in undisturbed.path.glob("export/*.safetensors")}
    assert again == weights
    assert [end["kind"] for end in undisturbed.endings] == ["done", "done"]


def test_the_preflight_script_judges_every_node(site: Site) -> None:
    job = site.script("preflight", "recipes/tiny_slurm.yaml", options=("--ntasks-per-node=2",))
    site.lab.wait_for_state(job, "COMPLETED", JOB_S)
    (answer,) = site.runs.glob("**/preflight.json")
    nodes = {probe["node"] for probe in json.loads(answer.read_text())["probes"]}
    assert set(expand(site.lab.job_records(job)[0].nodes)) <= nodes


@pytest.mark.parametrize(("rank", "signum"), [(3, signal.SIGUSR2), (1, signal.SIGTERM)])
def test_a_signal_to_one_rank_saves_requeues_and_changes_no_loss(
    site: Site, undisturbed: Run, rank: int, signum: signal.Signals
) -> None:
    """Through ``sbatch slurm/tiny.sh``, where the undisturbed run went through ``launch``."""
    job, run = site.train()
    site.lab.wait_for(reaches_step(run, 4), JOB_S, job)
    signal_rank(job, rank, signum)
    site.lab.wait_for(lambda: len(site.lab.job_records(job)) == 2, JOB_S, job)
    saved = run.endings[0]["durable_step"]
    assert saved == run.durable_steps()[-1] >= 4
    manifest = json.loads((run.path / "manifest.json").read_text())
    site.finish(job, run, undisturbed)
    assert [(end["kind"], end["exit_code"]) for end in run.endings] == [("preempted", 75), ("done", 0)]
    assert run.endings[1]["first_step"] == saved
    assert json.loads((run.path / "manifest.json").read_text()) == manifest
    assert [record["event"] for record in run.ledger].count("requeue") == 1
    assert (run.path / "attempts/latest").resolve().name == "2"


def test_the_time_limit_is_met_by_a_save_and_a_requeue(site: Site, undisturbed: Run) -> None:
    job, run = site.train()
    site.lab.wait_for(reaches_step(run, 2), JOB_S, job)
    soon = (datetime.now() + timedelta(seconds=55)).isoformat(timespec="seconds")
    site.lab.run("scontrol", "update", f"jobid={job}", f"EndTime={soon}")
    site.lab.wait_for(lambda: [r for r in run.ledger if r["event"] == "requeue"], JOB_S, job)
    site.lab.run("scontrol", "update", f"jobid={job}", "TimeLimit=00:30:00")
    site.finish(job, run, undisturbed)
    assert [(end["kind"], end["exit_code"]) for end in run.endings] == [("time_limit", 75), ("done", 0)]
    assert [record["event"] for record in run.ledger if record["event"] in ("signal", "end")][:2] == ["signal", "end"]


def test_a_walltime_that_holds_no_save_is_refused(site: Site) -> None:
    job = site.script("tiny", options=("--time=00:01:00",))
    record = site.lab.wait_for_end(job)
    assert (record.state, record.exit_code) == ("FAILED", "64:0"), site.lab.output_of(job)
    assert "--time=" in site.lab.output_of(job)
    assert not site.run("tiny_slurm").folder.has_trained
