"""A rank, a node, the data or the code of a run goes bad."""

from __future__ import annotations

import json
import random
import signal

import pytest

from tests.slurm.site import JOB_S, Run, Site, expand, signal_rank

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_killed_rank_is_started_again_without_its_node(site: Site, undisturbed: Run) -> None:
    """From the last save, and the node goes into the next submissions' exclude list with a reason and an expiry."""
    job, run = site.train()
    site.lab.wait_for(lambda: 10 in run.durable_steps(), JOB_S, job)
    rank = random.randrange(4)
    signal_rank(job, rank, signal.SIGKILL)
    site.finish(job, run, undisturbed)
    first, last = run.endings
    assert (first["kind"], first["exit_code"], first["rank"]) == ("infrastructure", 69, rank)
    assert first["durable_step"] >= 10
    assert "SIGKILL" in first["cause"]
    before, after = site.lab.job_records(job)
    assert first["node"] == expand(before.nodes)[rank // 2]
    assert first["node"] not in expand(after.nodes)
    assert (last["kind"], last["exit_code"]) == ("done", 0)
    kept = (site.runs / "excluded_nodes.json").read_text()
    assert first["node"] in kept
    assert job in kept
    dry = site.launch("tiny_slurm", "--nodes=2", "--dry-run").stdout
    assert f"#SBATCH --exclude={first['node']}\n" in dry


@pytest.mark.parametrize("which", [0, 1], ids=["batch_host", "other_node"])
def test_a_node_without_power_is_replaced(site: Site, undisturbed: Run, which: int) -> None:
    """With the batch host the supervisor dies too, and the next start files what happened."""
    job, run = site.train()
    site.lab.wait_for(lambda: 10 in run.durable_steps(), JOB_S, job)
    lost = expand(site.lab.job_records(job)[0].nodes)[which]
    site.lab.power_off(lost)
    site.lab.wait_for(lambda: len(site.lab.job_records(job)) == 2, JOB_S, job)
    site.finish(job, run, undisturbed)
    records = site.lab.job_records(job)
    assert records[0].state in ("NODE_FAIL", "REQUEUED")
    assert lost not in expand(records[1].nodes)
    assert [end["kind"] for end in run.endings] == ["node_failure", "done"]
    assert run.endings[0]["node"] == lost


def test_a_poisoned_run_is_not_requeued(site: Site) -> None:
    job, run = site.script("tiny", "optim.lr=1e30", "optim.max_grad_norm=0.0"), site.run("tiny_slurm")
    record = site.lab.wait_for_end(job, JOB_S)
    assert (record.state, record.exit_code) == ("FAILED", "17:0"), site.lab.output_of(job)
    assert len(site.lab.job_records(job)) == 1
    assert [(end["kind"], end["exit_code"]) for end in run.endings] == [("not_finite", 17)]
    assert not (site.runs / "excluded_nodes.json").exists()


def test_a_crash_loop_ends_in_93_and_a_held_job(site: Site) -> None:
    """Rank 3 dies at every start, before torch is imported; three restarts bring nothing new."""
    trap = site.folder / "trap"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'moe_recipes.train' in sys.orig_argv and os.environ.get('RANK') == '3':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    mounts = [*site.plain["container"]["mounts"], f"{trap}:{trap}:ro"]
    site.write_cluster(container={"mounts": mounts}, env={"PYTHONPATH": str(trap)})
    job, run = site.train()
    site.lab.wait_for(lambda: [r for r in run.ledger if r["event"] == "hold"], 2 * JOB_S, job)
    site.lab.wait_for(lambda: "Held" in site.lab.reason_of(job) or "held" in site.lab.reason_of(job), JOB_S, job)
    site.lab.wait_for_state(job, "PENDING", JOB_S)
    assert len(run.endings) == 4
    assert {end["kind"] for end in run.endings} == {"infrastructure"}
    assert {end["rank"] for end in run.endings} == {3}
    held = run.ledger[-1]
    assert held["event"] == "hold"
    assert "93" in json.dumps(held)
    assert "restarts without a newer durable step" in site.lab.run("scontrol", "show", "job", job).stdout
