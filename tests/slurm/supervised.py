"""Jobs for the tests of the supervisor: the real supervisor, srun and tasks, with children that need no torch."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_recipes.config.cluster import cluster_from_dict
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.slurm.ledger import Ledger
from moe_recipes.launch.slurm.spec import JobSpec, Work, write_spec
from tests.slurm.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
PYTHON = shlex.quote(sys.executable)
TASK = """
import sys
sys.executable = {python!r}
from moe_recipes.launch.slurm.task import main
sys.exit(main())
"""
WRAPPER = """#!/bin/bash
export PYTHONPATH={root}
if [[ "$*" == *"-m moe_recipes.launch.slurm.task"* ]]; then shift 3; exec {python} -u {folder}/task.py "$@"; fi
exec {python} -u {folder}/child.py "$@"
"""
CHILD = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
from moe_recipes.config.run_folder import RunFolder
folder, rank = RunFolder(sys.argv[3]), int(os.environ["RANK"])
restart = int(os.environ["MOE_RESTART_COUNT"])
got = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(number))
def leave(code, state=None, **fields):
    if rank == 0 and state is not None:
        folder.write_status(state, exit_code=code, **fields)
    os._exit(code)
def step(number, durable=None):
    if rank == 0:
        with open(folder.metrics, "a") as file:
            file.write(json.dumps({"step": number, "step_s": 0.1}) + "\\n")
        folder.write_status("running", step=number, last_durable_step=durable)
        if number == 1:
            folder.append_event("first step", step=1)
def save(number):
    if rank == 0:
        folder.append_event("checkpoint", step=number, seconds=0.1)
        folder.write_status("running", step=number, last_durable_step=number)
def until_told(then):
    while not got:
        time.sleep(0.05)
    then()
def save_and_leave(number):
    print("told by", signal.Signals(got[0]).name if got[0] else "nobody", flush=True)
    save(number)
    time.sleep(0.3)
    leave(75, "stopped", cause=f"stopped by a signal after step {number}")
"""
BATCH = """#!/bin/bash
#SBATCH --open-mode=append --requeue
mkdir -p {run}/slurm/$SLURM_JOB_ID
cp {folder}/spec.json {run}/slurm/$SLURM_JOB_ID/
export PYTHONPATH={root}
exec {python} -u -c 'import sys; from moe_recipes.launch.slurm.supervise import supervise
sys.exit(supervise(sys.argv[1]))' {run}/slurm/$SLURM_JOB_ID/spec.json
"""


@dataclasses.dataclass
class Job:
    """A job whose ranks run ``body``."""

    lab: Lab
    folder: Path
    spec: JobSpec
    id: str = ""

    @property
    def run(self) -> RunFolder:
        return self.spec.folder

    def submit(self, *words: str) -> Job:
        self.id = self.lab.sbatch(
            f"--nodes={self.spec.num_nodes}",
            f"--ntasks-per-node={self.spec.tasks_per_node}",
            *(words or ("--time=30",)),
            self.folder / "batch.sh",
        )
        return self

    def ledger(self, event: str | None = None) -> list[dict[str, Any]]:
        return [one for one in Ledger(self.run).records() if event in (None, one["event"])]

    def rank_log(self, attempt: int, rank: int) -> str:
        return (self.run.attempts / str(attempt) / f"rank-{rank:05d}.log").read_text()

    def end(self) -> dict[str, Any]:
        return self.ledger("end")[-1]

    @property
    def output(self) -> str:
        return self.lab.output_of(self.id)

    def wait(self, condition: Callable[[], Any], deadline_s: float = 60) -> None:
        self.lab.wait_for(condition, deadline_s, self.id)

    def wait_for_step(self, step: int, deadline_s: float = 60) -> None:
        self.wait(lambda: ((self.run.read_status() or {}).get("step") or 0) >= step, deadline_s)

    def states(self) -> list[str]:
        return [record.state.split()[0] for record in self.lab.job_records(self.id)]


def make_job(
    lab: Lab, folder: Path, body: str, *, nodes: int = 2, tasks: int = 1, work: Work = "train", **limits: Any
) -> Job:
    """Files of a job in ``folder``; ``body`` is Python that every rank runs after ``CHILD``."""
    run = folder / "run"
    python = folder / "python"
    cluster = cluster_from_dict(
        {
            "name": "lab",
            "slurm": {"partition": "main", "gpus_per_node": 0, "time": "00:30:00", "exclusive": False},
            "container": {"runtime": "none", "python": str(python)},
            "paths": {"runs": str(folder)},
            "limits": limits,
        },
        "the test",
    )
    ranks = nodes * tasks
    overrides = (f"run_dir={run}", f"parallel.fsdp_size={ranks}", "parallel.ep_size=1")
    spec = JobSpec(
        work=work,
        recipe=recipe_to_dict(load_recipe(str(ROOT / "recipes" / "tiny_cpu.yaml"), overrides)),
        recipe_file="tiny_cpu",
        overrides=overrides,
        cluster=cluster,
        run_dir=str(run),
        num_nodes=nodes,
        tasks_per_node=tasks,
        shakedown=False,
        code_dir=str(ROOT),
        time_limit_s=1800,
    )
    folder.mkdir(exist_ok=True)
    write_spec(folder / "spec.json", spec)
    places = {"root": ROOT, "python": PYTHON, "folder": folder, "run": run}
    python.write_text(WRAPPER.format(**places))
    python.chmod(0o755)
    (folder / "task.py").write_text(TASK.format(python=str(python)))
    (folder / "child.py").write_text(CHILD + body)
    (folder / "batch.sh").write_text(BATCH.format(**places))
    return Job(lab, folder, spec)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
