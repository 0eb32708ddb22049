"""What the scenario tests need of a site: a cluster file, run folders, and the processes of a running job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moe_recipes.config.run_folder import RunFolder
from tests.slurm.images import mount_of_packages
from tests.slurm.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("optim.schedule=constant", "checkpoint.every_steps=10")
UNDISTURBED_STEPS = 30
"""Overrides of recipes/tiny_slurm.yaml. A run that will be disturbed has no end of its own: it still trains when the
disturbance comes, however fast the machine. At a constant learning rate its first steps are those of a short run."""

JOB_S = 400
"""Deadline for a job of tiny training on a busy machine; never a time that is asserted."""


class Site:
    """A lab with its cluster file and a folder for runs."""

    def __init__(self, lab: Lab, image: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lab, self.folder = lab, folder
        self.runs = folder / "runs"
        self.cluster = folder / "cluster.yaml"
        self.plain: dict[str, Any] = {
            "name": "lab",
            "slurm": {"partition": "main", "gpus_per_node": lab.gpus_per_node, "time": "00:30:00"},
            "container": {"runtime": "pyxis", "image": str(image), "mounts": [mount_of_packages()]},
            "paths": {"runs": str(self.runs)},
        }
        self.write_cluster()

    def write_cluster(self, **sections: dict[str, Any]) -> Path:
        """Write the cluster file; ``sections`` replace keys of it."""
        plain = json.loads(json.dumps(self.plain))
        for section, values in sections.items():
            plain.setdefault(section, {}).update(values)
        self.cluster.write_text(yaml.safe_dump(plain))
        return self.cluster

    @property
    def environment(self) -> dict[str, str]:
        """What an operator sets before ``sbatch slurm/x.sh``."""
        return {"MOE_CLUSTER": str(self.cluster), "MOE_PYTHON": sys.executable}

    def train(self, *options: str) -> tuple[str, Run]:
        """``sbatch slurm/tiny.sh`` of a run that goes on until somebody stops it."""
        return self.script("tiny", *TRAINING, "train.steps=1000000", options=options), self.run("tiny_slurm")

    def finish(self, job: str, run: Run, undisturbed: Run) -> None:
        """Let a run that was disturbed come as far as the undisturbed one, compare bit for bit, and stop it."""
        last = len(undisturbed.trained)
        self.lab.wait_for(reaches_step(run, last), JOB_S, job)
        run.folder.stop_file.touch()
        self.lab.wait_for_state(job, "COMPLETED", JOB_S)
        # The last step of a whole run is logged in more detail.
        assert run.trained[: last - 1] == undisturbed.trained[: last - 1]
        assert run.steps == list(range(1, len(run.steps) + 1))

    def script(self, name: str, *overrides: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """``sbatch OPTIONS slurm/NAME.sh OVERRIDES`` from the repository, as an operator types it; the job id."""
        words = [*options, f"slurm/{name}.sh", *overrides]
        return self.lab.sbatch(*words, cwd=ROOT, env=self.environment | variables)

    def launch(self, recipe: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``moe-recipes launch RECIPE --cluster FILE`` on the login node."""
        command = [sys.executable, "-m", "moe_recipes.launch.cli", "launch", recipe, "--cluster", str(self.cluster)]
        return self.lab.run(*command, *words, check=check, cwd=ROOT)

    def run(self, name: str) -> Run:
        return Run(self.runs / name)


class Run:
    """What a run left in its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = RunFolder(path)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole JSON lines of a file of the run folder; none while it is not there."""
        path = self.path / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.lines("metrics.jsonl")]

    @property
    def trained(self) -> list[dict[str, Any]]:
        """What two runs must share bit for bit: every step's record without times and memory."""
        endings = ("_s", "_per_gpu", "_gib", "mfu")
        return [{k: v for k, v in r.items() if not k.endswith(endings)} for r in self.lines("metrics.jsonl")]

    @property
    def status(self) -> dict[str, Any]:
        return self.folder.read_status() or {}

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return self.lines("slurm/ledger.jsonl")

    @property
    def endings(self) -> list[dict[str, Any]]:
        """The verdict of each start that ended, in order."""
        return [record for record in self.ledger if record["event"] == "end"]

    def durable_steps(self) -> list[int]:
        return [record["step"] for record in self.lines("events.jsonl") if record["event"] == "checkpoint"]


def expand(nodes: str) -> list[str]:
    """The names in a node list of this lab, such as ``node[1-2,4]``."""
    if not (match := re.fullmatch(r"node\[(.+)\]", nodes)):
        return [nodes]
    names = []
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        names += [f"node{number}" for number in range(int(first), int(last or first) + 1)]
    return names


def reaches_step(run: Run, step: int) -> Callable[[], bool]:
    """For ``wait_for``: the run has finished ``step``."""
    return lambda: bool(run.steps) and run.steps[-1] >= step


def rank_process(job: str, rank: int, module: str = "moe_recipes.train") -> int | None:
    """Process id, on this machine, of the process that runs ``module`` as a rank of a job on any node."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in words and {f"RANK={rank}".encode(), f"MOE_JOB_ID={job}".encode()} <= set(variables):
            return int(process.name)
    return None


def signal_rank(job: str, rank: int, signum: signal.Signals) -> None:
    """Send a signal to the trainer of one rank, and to no other process."""
    pid = rank_process(job, rank)
    assert pid is not None, f"job {job} has no process of rank {rank}"
    os.kill(pid, signum)
