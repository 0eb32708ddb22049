"""The host side on a real Slurm: its own small Python, Slurm's commands, and a cluster file from what Slurm says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_recipes.config.cluster import load_cluster
from moe_recipes.config.errors import InfrastructureError, MissingInputError
from moe_recipes.launch.cli import main
from moe_recipes.launch.slurm import commands, excluded
from moe_recipes.launch.slurm.supervise import is_alive
from moe_recipes.launch.slurm.watch import kill_wait_s
from tests.slurm.lab import Lab
from tests.slurm.site import ROOT, Site

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".host", "runs", "__pycache__", ".*_cache", "*.egg-info", ".gpu", "local.yaml"
)
MOST_BYTES = 100_000_000
APPTAINER = """\
#!/bin/bash
# Takes the words of `apptainer exec` that the launcher uses, notes them, and runs the rest without a container.
echo "$@" >>"$NOTES"
while [[ $1 == --* ]]; do case $1 in --bind) shift 2 ;; --pwd) cd "$2" || exit 1; shift 2 ;; *) shift ;; esac; done
shift
while IFS='=' read -r name value; do export "${name#APPTAINERENV_}=$value"; done < <(env | grep ^APPTAINERENV_)
exec "$@"
"""


@pytest.fixture
def of_lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab whose Slurm this process speaks to."""
    monkeypatch.setenv("SLURM_CONF", str(lab.conf))
    return lab


def test_make_host_is_small_has_no_torch_and_runs_both_paths(site: Site, slurm_folder: Path) -> None:
    clone = slurm_folder / "clone"
    shutil.copytree(ROOT, clone, ignore=NOT_COPIED)
    made = subprocess.run(["make", "host", f"PYTHON={sys.executable}"], cwd=clone, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    host = clone / ".host"
    size = sum(path.lstat().st_size for path in host.rglob("*"))
    assert 1_000_000 < size < MOST_BYTES
    without = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'transformers', 'numpy'))))"
    assert subprocess.run([host / "bin" / "python", "-c", without], cwd=host).returncode == 0
    site.write_cluster(container={"runtime": "none", "python": sys.executable, "image": None, "mounts": []})
    environ = {"MOE_WORK": "probe", "PYTHONPATH": ""}  # the package is the one that `make host` has installed
    missing = site.lab.sbatch("slurm/tiny.sh", cwd=clone, env=environ)
    assert site.lab.wait_for_end(missing).exit_code == "66:0"
    assert f"{clone}/clusters/local.yaml: no such cluster file; write it with" in site.lab.output_of(missing)
    shutil.copy(site.cluster, clone / "clusters" / "local.yaml")
    excluded.add(site.runs / "excluded_nodes.json", "node1", reason="went bad", job="1", hours=1)
    by_script = site.lab.sbatch("slurm/tiny.sh", cwd=clone, env=environ)
    site.lab.wait_for_state(by_script, "COMPLETED")
    # sbatch has read no file: the job got the bad node, and says so.
    assert "note: node1 of this job is in " in site.lab.output_of(by_script)
    assert "sbatch --exclude=node1\n" in site.lab.output_of(by_script)
    words = [host / "bin" / "moe-recipes", "launch", "tiny_slurm", "--nodes=2", "--json"]
    by_launch = json.loads(site.lab.run(*words, cwd=clone, env=environ).stdout)["job"]
    site.lab.wait_for_state(by_launch, "COMPLETED")
    run = site.run("tiny_slurm")
    assert [end["kind"] for end in run.endings] == ["done", "done"]
    for attempt, nodes in (("1", {"node1", "node2"}), ("2", {"node2", "node3"})):
        probes = [json.loads(path.read_text()) for path in (run.path / "attempts" / attempt).glob("probe-*.json")]
        assert {(probe["rank"], probe["code"]) for probe in probes} == {
            (r, str(clone / "moe_recipes")) for r in range(4)
        }
        assert {probe["host"] for probe in probes} == nodes
    for job in (by_script, by_launch):
        folder = run.path / "slurm" / job
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in folder.iterdir()} >= {"spec.json", f"{job}_submitted.pkl"}
    assert (run.path / "slurm").stat().st_mode & 0o777 == 0o700


def test_apptainer_gets_mounts_folder_image_and_variables(site: Site) -> None:
    wrapper, notes = site.folder / "apptainer", site.folder / "notes"
    wrapper.write_text(APPTAINER.replace("$NOTES", str(notes)))
    wrapper.chmod(0o755)
    container = {"runtime": "apptainer", "image": "/images/a.sif", "mounts": ["/tmp:/data:ro"]}
    container |= {"python": sys.executable, "command": [str(wrapper)]}
    site.write_cluster(container=container, env={"NCCL_IB_HCA": "mlx5_0,mlx5_1"})
    job = site.script("tiny", MOE_WORK="probe")
    site.lab.wait_for_state(job, "COMPLETED")
    probe = json.loads((site.run("tiny_slurm").path / "attempts/1/probe-00003.json").read_text())
    assert {"NCCL_IB_HCA", "RANK", "MASTER_ADDR"} <= set(probe["environment_names"])
    assert probe["container"]["cwd"] == str(ROOT)
    asked = notes.read_text().splitlines()
    assert len(asked) == 4
    assert f"--bind /tmp:/data:ro --pwd {ROOT} /images/a.sif {sys.executable} -u -m" in asked[0]


def test_init_describes_this_cluster(of_lab: Lab, tmp_path: Path) -> None:
    output = tmp_path / "local.yaml"
    assert main(["cluster", "init", "--output", str(output), "--image", "/images/a.sqsh"]) == 0
    cluster = load_cluster(output)
    cpus = int(of_lab.run("sinfo", "-h", "-p", "main", "-o", "%c").stdout)
    assert (cluster.slurm.partition, cluster.slurm.gpus_per_node) == ("main", 8)
    assert cluster.slurm.cpus_per_task == cpus // 8 > 0
    assert cluster.container.runtime == "pyxis", "the stand-in has pyxis's flags"
    assert main(["cluster", "init", "--output", str(output), "--force", "--partition", "nosuch"]) == 64


def test_facts_of_a_job_are_those_of_slurm(of_lab: Lab) -> None:
    job = of_lab.sbatch("--nodes=2", "--time=5", "--comment=a comment", "--job-name=two words", "--wrap=sleep 60")
    of_lab.wait_for_state(job, "RUNNING")
    facts = commands.job_facts(job)
    assert (facts.job_id, facts.name, facts.state, facts.comment) == (job, "two words", "RUNNING", "a comment")
    assert facts.nodes == commands.hostnames(of_lab.run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip())
    assert (facts.num_nodes, facts.time_limit_s, facts.restart_count, facts.partition) == (2, 300, 0, "main")
    assert facts.start_time is not None
    assert facts.end_time == facts.start_time + 300
    commands.requeue_hold(job, "mend the recipe")
    of_lab.wait_for_state(job, "PENDING")
    commands.exclude_nodes(job, ["node2", "node1"])
    held = commands.job_facts(job)
    assert (held.state, held.reason, held.restart_count) == ("PENDING", "job_requeued_in_held_state", 1)
    assert (held.comment, held.exclude) == ("mend the recipe", ("node1", "node2"))
    of_lab.wait_for(lambda: len(commands.sacct_records(job)) == 2, 30)
    first, _ = commands.sacct_records(job)
    assert (first.state, first.nodes, first.partition) == ("REQUEUED", facts.nodes, "main")
    commands.cancel_job(job)
    of_lab.wait_for(lambda: commands.sacct_records(job)[-1].state == "CANCELLED", 30)
    assert commands.sacct_records(job)[-1].by == "0"
    with pytest.raises(MissingInputError, match="Slurm knows no such job"):
        commands.job_facts("99999999")


def test_nodes_of_a_partition(of_lab: Lab) -> None:
    nodes = commands.nodes_of_partition("high")
    assert [node.name for node in nodes] == of_lab.nodes
    assert {(node.gpus, node.gpu_type, node.state) for node in nodes} == {(8, None, "idle")}
    assert nodes[0].cpus == int(of_lab.run("sinfo", "-h", "-p", "high", "-o", "%c").stdout)


def test_patience_lasts_until_the_scheduler_is_back(of_lab: Lab) -> None:
    job = of_lab.sbatch("--wrap=sleep 60")
    of_lab.slurmctld_stop()
    answers: list[str] = []
    asks = threading.Thread(target=lambda: answers.append(commands.job_facts(job, patience_s=120).job_id))
    try:
        with pytest.raises(InfrastructureError, match="the scheduler does not answer now"):
            commands.job_facts(job)
        asks.start()
        time.sleep(1.5)
        assert answers == []
    finally:
        of_lab.slurmctld_start()
    asks.join(60)
    assert answers == [job]


def test_times_are_read_whatever_format_the_site_has_set(of_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    job = of_lab.sbatch("--time=5", "--wrap=sleep 60")
    of_lab.wait_for_state(job, "RUNNING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    facts = commands.job_facts(job)
    assert facts.start_time is not None
    assert facts.end_time == facts.start_time + 300


def test_a_job_that_is_stopped_still_has_its_run_folder(of_lab: Lab) -> None:
    job = of_lab.sbatch("--time=5", "--wrap=sleep 60")
    of_lab.wait_for_state(job, "RUNNING")

    def is_stopped() -> bool:
        of_lab.run("scancel", "--full", "--signal=STOP", job)  # one that comes before the script has started is lost
        return commands.job_facts(job).state == "STOPPED"

    of_lab.wait_for(is_stopped, 30)
    assert is_alive(job)
    of_lab.run("scancel", "--full", "--signal=CONT", job)
    commands.cancel_job(job)
    of_lab.wait_for(lambda: not is_alive(job), 30)


def test_an_accounting_that_is_away_costs_no_answer(of_lab: Lab) -> None:
    job = of_lab.sbatch("--wrap=sleep 60")
    of_lab.slurmdbd_stop()
    try:
        assert commands.sacct_records(job) == []
        assert commands.job_facts(job).job_id == job
    finally:
        of_lab.slurmdbd_start()
    of_lab.wait_for(lambda: commands.sacct_records(job), 30)


def test_the_time_before_a_kill_is_that_of_slurm(of_lab: Lab) -> None:
    assert f"KillWait={kill_wait_s():.0f}" in of_lab.conf.read_text().split()
