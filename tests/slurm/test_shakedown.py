"""A shakedown on a real Slurm, all in one job: train, save, lose a rank, be requeued, resume, export, verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.lab import Lab
from tests.slurm.site import JOB_S, Run, Site

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture
def site(lab: Lab, image: Path, tmp_path: Path) -> Site:
    return Site(lab, image, tmp_path / "site")


def leave_an_old_shakedown(run: Run) -> None:
    """A finished one of another recipe: what would let a new one pass, or refuse it, if it were still there."""
    run.path.mkdir(parents=True)
    run.folder.recipe.write_text('{"name": "other"}')
    run.folder.metrics.write_text('{"step": 3, "loss": 1.0}\n')
    run.folder.write_status("done", step=3, last_durable_step=3, exit_code=0)


def test_a_job_loses_a_rank_is_requeued_and_passes(site: Site) -> None:
    run = site.run("tiny_slurm-shakedown")
    leave_an_old_shakedown(run)
    submitted = json.loads(site.launch("tiny_slurm", "--nodes=2", "--shakedown", "--json").stdout)
    job = submitted["job"]
    site.lab.wait_for(lambda: "requeue" in [record["event"] for record in run.ledger], JOB_S, job)
    site.lab.wait_for(lambda: (run.path / "shakedown.json").exists(), JOB_S, job)
    record = site.lab.wait_for_end(job, JOB_S)
    said = Path(submitted["log"]).read_text()
    assert (record.state, record.exit_code) == ("COMPLETED", "0:0"), said
    assert "shakedown PASS" in said

    verdict = json.loads((run.path / "shakedown.json").read_bytes())
    assert verdict["verdict"] == "PASS"
    assert run.steps == [1, 2, 3]
    killed = next(record for record in run.lines("events.jsonl") if record["event"] == "shakedown kill")
    assert [(end["kind"], end["rank"], end["durable_step"]) for end in run.endings] == [
        ("infrastructure", killed["rank"], 2),
        ("done", None, 3),
    ]
    assert not (site.runs / "excluded_nodes.json").exists()  # a rank that was killed on purpose accuses no node
    assert "ExcNodeList=(null)" in site.lab.run("scontrol", "show", "job", job).stdout
    assert not (site.runs / "tiny_slurm").exists()
