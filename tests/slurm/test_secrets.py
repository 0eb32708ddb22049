"""Tokens in a job on a real Slurm: the trainer has them, and a canary is in no other place that anybody can read."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.slurm.lab import Lab
from tests.slurm.site import JOB_S, ROOT, Run, Site, rank_process

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
HF, WANDB, SHELL = f"hf_{uuid.uuid4().hex}", f"{uuid.uuid4().hex}c0ffee00", f"shell{uuid.uuid4().hex}"
"""Of this session alone: every process of the machine is looked at. The last is exported where the job is submitted."""

CANARIES = tuple(text.encode() for text in (HF, WANDB, SHELL))
TASKS = 4


@pytest.fixture
def site(lab: Lab, image: Path, tmp_path: Path) -> Site:
    """A site whose secrets lie apart from everything that a job writes."""
    secrets = tmp_path / "keys" / "secrets"
    secrets.parent.mkdir()
    secrets.write_text(f"HF_TOKEN={HF}\nWANDB_API_KEY={WANDB}\n")
    secrets.chmod(0o600)
    site = Site(lab, image, tmp_path / "site")
    site.plain["paths"]["secrets"] = str(secrets)
    site.write_cluster()
    return site


def secrets_of(site: Site) -> Path:
    return Path(site.plain["paths"]["secrets"])


def holds(data: bytes) -> list[bytes]:
    return [canary for canary in CANARIES if canary in data]


def files_with_canary(folders: Iterable[Path]) -> list[str]:
    """Files of any kind under the folders whose bytes or name hold a canary."""
    found, seen = [], 0
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                seen += 1
                if holds(path.read_bytes()) or holds(str(path).encode()):
                    found.append(str(path))
    assert seen > 30
    return found


def processes() -> dict[int, tuple[bytes, bytes, int]]:
    """Command line, environment and parent of every process of this machine and of the nodes."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes(),
                    (folder / "environ").read_bytes(),
                    parent,
                )
            except OSError:
                continue
    return found


def below(pid: int, ancestors: set[int], seen: dict[int, tuple[bytes, bytes, int]]) -> bool:
    """Whether a process is one of ``ancestors`` or a descendant of one."""
    while pid in seen:
        if pid in ancestors:
            return True
        pid = seen[pid][2]
    return False


def check_processes(job: str) -> None:
    """The trainers' environment holds the tokens; no command line does, and no environment of another process."""
    trainers = {pid for rank in range(TASKS) if (pid := rank_process(job, rank)) is not None}
    assert len(trainers) == TASKS
    seen = processes()
    for pid in trainers:
        variables = seen[pid][1].split(b"\0")
        assert f"HF_TOKEN={HF}".encode() in variables  # the one place; without it this test would show nothing
        assert f"WANDB_API_KEY={WANDB}".encode() in variables
    assert [words for words, _, _ in seen.values() if holds(words)] == []
    with_canary = {pid for pid, (_, environment, _) in seen.items() if holds(environment)}
    assert [seen[pid][0] for pid in with_canary if not below(pid, trainers, seen)] == []
    assert not any(SHELL.encode() in environment for _, environment, _ in seen.values())
    watched = {name: sum(name in words for words, _, _ in seen.values()) for name in (b"slurmstepd", b"srun")}
    assert min(watched.values()) > 0, watched  # the processes that a leak would show in were there


def check_slurm(lab: Lab, job: str, folder: Path) -> None:
    """What Slurm tells anybody about a job: fields, script, environment, steps, accounting."""
    script = folder / "batch_script"
    lab.run("scontrol", "write", "batch_script", job, script)
    said = {
        "script": script.read_text(),
        "job": lab.run("scontrol", "show", "job", "-dd", job).stdout,
        "step": lab.run("scontrol", "show", "step", job).stdout,
        "squeue": lab.run("squeue", "-j", job, "-o", "%all").stdout,
        "sacct": lab.run("sacct", "-D", "-j", job, "--format=ALL").stdout,
        "variables": lab.run("sacct", "-j", job, "--env-vars").stdout,
        "stored script": lab.run("sacct", "-j", job, "--batch-script").stdout,
    }
    assert all("submitit" in said[name] or "inside" in said[name] for name in ("script", "stored script"))
    assert "PATH=" in said["variables"]
    assert [name for name in ("job", "step", "squeue", "sacct") if job not in said[name]] == []
    assert {name: text for name, text in said.items() if holds(text.encode())} == {}


def requeue(site: Site, job: str, run: Run) -> None:
    """Have the job save and start again: the second start has the tokens too, and goes on in the same W&B run."""
    site.lab.run("scancel", "--batch", "--signal=USR2", job)
    site.lab.wait_for(lambda: (run.path / "attempts/2").exists(), JOB_S, job)
    *_, saved = run.durable_steps()  # the newest: an older one is behind the steps of the first start already
    site.lab.wait_for(lambda: run.steps[-1] > saved, JOB_S, job)
    check_processes(job)
    site.lab.wait_for(lambda: len(list(run.path.glob("wandb/offline-run-*"))) == 2, JOB_S, job)
    ids = {path.name.rpartition("-")[2] for path in run.path.glob("wandb/offline-run-*")}
    assert ids == {(run.path / "wandb_id").read_text().strip()}


def watch(site: Site, job: str, run: Run, folder: Path, *, requeued: bool) -> None:
    """Look at processes and Slurm once the job trains, then let it come to its end and look at all that is left."""
    site.lab.wait_for(lambda: run.steps and run.steps[-1] >= 1, JOB_S, job)
    check_processes(job)
    check_slurm(site.lab, job, folder)
    if requeued:
        requeue(site, job, run)
    (run.path / "STOP").touch()
    assert site.lab.wait_for_end(job, JOB_S).exit_code == "0:0", site.lab.output_of(job)
    assert list(run.path.rglob("run-*.wandb")), "no W&B folder, so nothing was shown about it"
    assert list((run.path / "slurm").rglob("*_submitted.pkl"))
    assert list((run.path / "attempts").rglob("rank-00003.log"))


OVERRIDES = ("log.wandb=offline", "train.steps=100000", "optim.lr=1e-5")


def test_a_canary_is_in_the_trainer_and_nowhere_else(site: Site, records: Path, tmp_path: Path) -> None:
    assert all(holds(secrets_of(site).read_bytes()).count(canary) == 1 for canary in CANARIES[:2])
    leaky = {"HF_TOKEN": SHELL, "WANDB_API_KEY": SHELL, "MY_SECRET": SHELL}
    words = [word for text in OVERRIDES for word in ("--set", text)]
    command = [sys.executable, "-m", "moe_recipes.launch.cli", "launch", "tiny_slurm", "--cluster", site.cluster]
    command += ["--nodes", "2"]

    dry = site.lab.run(*command, *words, "--dry-run", cwd=ROOT, env=leaky)
    assert "srun" in dry.stdout
    assert not holds((dry.stdout + dry.stderr).encode())

    launched = site.lab.run(*command, *words, "--json", cwd=ROOT, env=leaky)
    assert not holds((launched.stdout + launched.stderr).encode())
    job = json.loads(launched.stdout)["job"]
    watch(site, job, site.run("tiny_slurm"), tmp_path, requeued=False)

    second = ["run_dir=" + str(site.runs / "by_script"), *OVERRIDES]
    job = site.script("tiny", *second, **leaky)
    watch(site, job, site.run("by_script"), tmp_path, requeued=True)
    assert not holds(site.lab.output_of(job).encode())

    # Everything that the cluster keeps: spools, saved state, daemons' logs, the database; and all runs.
    assert files_with_canary([site.lab.folder, site.folder, records]) == []


def test_a_secrets_file_that_others_may_read_ends_the_job_with_77(site: Site, tmp_path: Path) -> None:
    secrets_of(site).chmod(0o644)
    refused = site.launch("tiny_slurm", "--nodes", "2", check=False)
    assert refused.returncode == 77
    assert (
        refused.stderr.strip()
        == f"moe-recipes: error: {secrets_of(site)}: has mode 0644, others may read it; run:"
        + (f" chmod 600 {secrets_of(site)}")
    )
    job = site.script("tiny")
    assert site.lab.wait_for_end(job, JOB_S).exit_code == "77:0"
    said = site.lab.output_of(job)
    assert f"has mode 0644, others may read it; run: chmod 600 {secrets_of(site)}" in said
    assert not holds(said.encode())
    assert site.run("tiny_slurm").steps == []
