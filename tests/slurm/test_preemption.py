"""A job of a higher partition takes the nodes of a run, which saves, waits, and goes on where it was."""

from __future__ import annotations

import pytest

from tests.slurm.site import JOB_S, Run, Site, reaches_step

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_preemption_by_a_higher_partition(site: Site, undisturbed: Run) -> None:
    job, run = site.train()
    site.lab.wait_for(reaches_step(run, 4), JOB_S, job)
    urgent = site.lab.sbatch("--partition=high", "--nodes=4", "--exclusive", "--wrap", "sleep 3")
    site.lab.wait_for_state(urgent, "COMPLETED", JOB_S)
    saved = run.durable_steps()
    assert saved, "the run was ended without a save"
    site.finish(job, run, undisturbed)
    assert [(end["kind"], end["exit_code"]) for end in run.endings] == [("preempted", 75), ("done", 0)]
    assert run.endings[0]["durable_step"] == saved[-1]
    assert not (site.runs / "excluded_nodes.json").exists()


def test_a_cancelled_job_saves_and_stays_away(site: Site) -> None:
    job, run = site.train()
    site.lab.wait_for(reaches_step(run, 2), JOB_S, job)
    site.lab.run("scancel", job)
    record = site.lab.wait_for_end(job, JOB_S)
    assert record.state == "CANCELLED"
    site.lab.wait_for(lambda: run.endings, JOB_S, job)
    assert [end["kind"] for end in run.endings] == ["stopped_by_operator"]
    assert "requeue" not in [record["event"] for record in run.ledger]
