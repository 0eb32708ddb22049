"""Jobs that are submitted wrongly, in odd places, twice, in a chain, or while the scheduler is away. No torch here."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.site import ROOT, Site

DEADLINE_S = 200
pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def probes(site: Site, run: str, attempt: int = 1) -> list[dict[str, Any]]:
    """What every task of an attempt noted about itself, by rank."""
    paths = sorted(site.run(run).path.glob(f"attempts/{attempt}/probe-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def plain_python(python: str) -> dict[str, Any]:
    """The container section of nodes without containers."""
    return {"runtime": "none", "image": None, "mounts": [], "python": python}


def refused(site: Site, job: str, code: int) -> str:
    """Wait until a job has ended with an exit code at its first start; its one line."""
    record = site.lab.wait_for_end(job, DEADLINE_S)
    assert (record.state, record.exit_code) == ("FAILED", f"{code}:0"), site.lab.output_of(job)
    assert len(site.lab.job_records(job)) == 1
    said = site.lab.output_of(job)
    assert "Traceback" not in said, said
    return said


def test_both_paths_start_the_same_tasks_in_the_container(site: Site, image: Path, records: Path) -> None:
    site.write_cluster(env={"SET_BY_IMAGE": "job", "OMP_NUM_THREADS": "3", "NCCL_SOCKET_IFNAME": "eth0,eth1"})
    by_script = site.script("tiny", "run_dir=" + str(site.runs / "a"), MOE_WORK="probe")
    site.lab.wait_for_state(by_script, "COMPLETED", DEADLINE_S)
    said = json.loads(
        site.launch("tiny_slurm", "--work=probe", f"--set=run_dir={site.runs / 'b'}", "--nodes=2", "--json").stdout
    )
    site.lab.wait_for_state(said["job"], "COMPLETED", DEADLINE_S)
    first, second = probes(site, "a"), probes(site, "b")
    assert [fact["rank"] for fact in first] == [0, 1, 2, 3]
    changing = ("time", "master", "node", "host")
    assert [{k: v for k, v in f.items() if k not in changing} for f in first] == [
        {k: v for k, v in f.items() if k not in changing} for f in second
    ]
    assert [fact["local_rank"] for fact in first] == [0, 1, 0, 1]
    assert {fact["visible_gpus"] for fact in first} == {"0,1"}
    assert not first[0]["container"]["root_is_writable"]
    assert first[0]["code"] == str(ROOT / "moe_recipes")
    assert all(fact["master"].startswith(f"{first[0]['host']}:") for fact in first)
    noted = (records / f"{by_script}.0.3").read_text()
    assert f"container-image={image}\n" in noted
    assert "container-name" not in noted
    named = next(line for line in noted.splitlines() if line.startswith("container-env=")).partition("=")[2].split(",")
    # Every variable of the job that the image or its hook would replace.
    assert {"SET_BY_IMAGE", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "MOE_MASTER_ADDR", "MOE_MASTER_PORT"} <= set(named)


def test_a_job_submitted_from_inside_a_job_gets_none_of_its_variables(site: Site) -> None:
    words = [sys.executable, "-m", "moe_recipes.launch.cli", "launch", "tiny_slurm", "--cluster", str(site.cluster)]
    words += ["--work=probe", "--nodes=2", "--json", f"--set=run_dir={site.runs / 'child'}"]
    inner = " ".join(shlex.quote(word) for word in words)
    odd = ("--nodes=1", "--ntasks=1", "--gpus-per-task=1", "--mem=1000", "--partition=main")
    parent = site.lab.sbatch(*odd, f"--chdir={ROOT}", "--wrap", f"export SECRET_OF_SHELL=1; srun {inner}")
    site.lab.wait_for_state(parent, "COMPLETED", DEADLINE_S)
    child = json.loads(site.lab.output_of(parent).splitlines()[-1])["job"]
    site.lab.wait_for_state(child, "COMPLETED", DEADLINE_S)
    facts = probes(site, "child")
    assert len(facts) == 4
    assert {fact["visible_gpus"] for fact in facts} == {"0,1"}
    names = set().union(*(fact["environment_names"] for fact in facts))
    assert "SECRET_OF_SHELL" not in names
    assert not {name for name in names if name.startswith(("SUBMITIT_", "SBATCH_", "SLURM_MEM"))}
    # What the scheduler itself keeps for the child's batch script.
    (kept,) = site.lab.folder.glob(f"state/hash.*/job.{child}/environment")
    variables = {entry.partition(b"=")[0].decode() for entry in kept.read_bytes().split(b"\0")}
    assert "PATH" in variables
    assert not variables & {"SECRET_OF_SHELL", "SLURM_GPUS_PER_TASK", "SLURM_STEP_ID", "SLURM_PROCID"}
    assert b"SLURM_JOB_ID=" + parent.encode() not in kept.read_bytes()
    assert "mem=1000M" not in site.lab.run("scontrol", "show", "job", child).stdout


def test_two_jobs_with_one_run_folder(site: Site) -> None:
    """The second is refused while the first runs, a probe beside it harms nothing, and a third may follow."""
    waits = site.folder / "python"
    waits.write_text(f'#!/bin/sh\ntrap "exit 75" TERM USR2\nsleep 300 & wait\nexec {sys.executable} "$@"\n')
    waits.chmod(0o755)
    site.write_cluster(container=plain_python(str(waits)))
    first, run = site.script("tiny"), site.run("tiny_slurm")
    site.lab.wait_for(lambda: (run.path / "attempts/1").exists(), DEADLINE_S, first)
    second = site.script("tiny")
    record = site.lab.wait_for_end(second, DEADLINE_S)
    assert (record.state, record.exit_code) == ("FAILED", "73:0"), site.lab.output_of(second)
    said = site.lab.output_of(second)
    assert f"job {first}" in said
    assert "Traceback" not in said
    assert not (run.path / "attempts/2").exists()
    site.write_cluster(container=plain_python(sys.executable))
    probe = site.script("tiny", MOE_WORK="probe")
    site.lab.wait_for_state(probe, "COMPLETED", DEADLINE_S)
    assert [(end["job"], end["kind"]) for end in run.endings] == [(probe, "done")]
    assert site.lab.state_of(first) == "RUNNING"
    site.lab.run("scancel", first)
    site.lab.wait_for_end(first, DEADLINE_S)
    third = site.script("tiny", MOE_WORK="probe")
    site.lab.wait_for_state(third, "COMPLETED", DEADLINE_S)
    assert {end["job"] for end in run.endings} == {probe, first, third}


def test_a_dependency_chain(site: Site) -> None:
    """``afterok`` starts after a job that is done, and never after one that failed."""
    good = site.script("tiny", "run_dir=" + str(site.runs / "good"), MOE_WORK="probe")
    after = json.loads(
        site.launch("tiny_slurm", "--work=probe", "--nodes=2", f"--dependency=afterok:{good}", "--json").stdout
    )["job"]
    bad = site.script("tiny", "no.such_key=1", MOE_WORK="probe")
    never = site.script("tiny", options=(f"--dependency=afterok:{bad}",), MOE_WORK="probe")
    site.lab.wait_for_state(after, "COMPLETED", DEADLINE_S)
    site.lab.wait_for_end(bad, DEADLINE_S)
    site.lab.wait_for(lambda: site.lab.reason_of(never) == "DependencyNeverSatisfied", DEADLINE_S, never)
    assert [r.state for r in site.lab.job_records(good)] == ["COMPLETED"]


def test_the_scheduler_is_away_when_the_step_ends(site: Site) -> None:
    """The verdict of a job that is done needs nobody; nothing is lost and nothing runs twice."""
    slow, away = site.folder / "python", site.folder / "away"
    # The tasks go on once the scheduler is gone: it is not there when they end.
    waits = f"touch {site.folder}/started-$SLURM_PROCID; until [ -e {away} ]; do sleep 0.2; done"
    slow.write_text(f'#!/bin/sh\n{waits}\nexec {shlex.quote(sys.executable)} "$@"\n')
    slow.chmod(0o755)
    site.write_cluster(container=plain_python(str(slow)))
    job = site.script("tiny", MOE_WORK="probe")
    run = site.run("tiny_slurm")
    site.lab.wait_for(lambda: len(list(site.folder.glob("started-*"))) == 4, DEADLINE_S, job)
    site.lab.slurmctld_stop()
    away.touch()
    site.lab.wait_for(lambda: len(list(run.path.glob("attempts/1/rank-*.exit.json"))) == 4, DEADLINE_S)
    site.lab.slurmctld_start()
    site.lab.wait_for_state(job, "COMPLETED", DEADLINE_S)
    assert [end["kind"] for end in run.endings] == ["done"]
    assert len(site.lab.job_records(job)) == 1


def test_wrong_partition(site: Site) -> None:
    """Slurm refuses one that it does not know; one that is not the cluster file's is refused by the job."""
    site.write_cluster(slurm={"partition": "nosuch"})
    refusal = site.launch("tiny_slurm", "--nodes=2", check=False)
    assert refusal.returncode == 64
    assert refusal.stderr.count("\n") == 1
    assert "nvalid partition" in refusal.stderr
    site.write_cluster()
    said = refused(site, site.script("tiny", options=("--partition=high",)), 64)
    assert "partition 'high'" in said
    site.write_cluster(slurm={"account": "nosuch"})
    refusal = site.launch("tiny_slurm", "--nodes=2", check=False)
    assert refusal.returncode == 64
    assert "nvalid account" in refusal.stderr


def test_too_few_nodes(site: Site) -> None:
    """For the recipe: the job says so. For the cluster: the scheduler's own words, before anything is queued."""
    said = refused(site, site.script("tiny", options=("--nodes=1",)), 64)
    assert "1 nodes x 2 tasks" in said
    refusal = site.launch("tiny_slurm", "--nodes=16", "--set=parallel.fsdp_size=16", "--test-only", check=False)
    assert refusal.returncode == 64
    assert "node configuration is not available" in refusal.stderr
    asked = site.launch("tiny_slurm", "--nodes=4", "--test-only")
    assert "to start at" in asked.stdout
    assert site.lab.run("squeue", "-h").stdout == ""


def test_missing_cluster_file(site: Site) -> None:
    site.cluster.unlink()
    said = refused(site, site.script("tiny"), 66)
    assert said.count("\n") == 1
    assert f"{site.cluster}: no such cluster file" in said


@pytest.mark.parametrize(
    ("container", "named"),
    [
        ({"image": "/no/such/image.sqsh"}, "/no/such/image.sqsh"),
        ({"mounts": ["/no/such/source:/data:ro"]}, "/no/such/source"),
        # pyxis imports an image of a registry before it starts any task: srun ends with 0 and no rank ever was.
        ({"image": "registry.invalid#a/image:1"}, "registry.invalid"),
    ],
)
def test_missing_image_or_mount_is_not_requeued(site: Site, container: dict[str, Any], named: str) -> None:
    site.write_cluster(container=container)
    job = site.script("tiny", MOE_WORK="probe")
    record = site.lab.wait_for_end(job, DEADLINE_S)
    assert record.state == "FAILED", site.lab.output_of(job)
    assert record.exit_code in ("66:0", "78:0")
    assert len(site.lab.job_records(job)) == 1
    assert named in site.lab.output_of(job)
    end = site.run("tiny_slurm").endings[-1]
    assert end["kind"] in ("user_error", "environment")
    assert named in end["cause"]


@pytest.mark.parametrize(
    ("script", "words"),
    [("qwen3_30b", ()), ("nemotron_nano_30b", ())],
)
def test_every_script_starts(site: Site, script: str, words: tuple[str, ...]) -> None:
    """Unmodified; all eight tasks of a node."""
    job = site.script(script, *words, MOE_WORK="probe")
    site.lab.wait_for_state(job, "COMPLETED", DEADLINE_S)
    folders = [path.parent for path in site.runs.glob("*/attempts/1/probe-00007.json")]
    assert len(folders) == 1
    assert len(list(folders[0].glob("probe-*.json"))) == 8
