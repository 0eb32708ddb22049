"""The host side of a preflight: one step outside the container, one inside it, and the verdict.

It is the same for a job of its own and for the first step of a training job.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from moe_recipes.config.cluster import cluster_to_dict
from moe_recipes.config.errors import EXIT_ENVIRONMENT, CannotWriteError
from moe_recipes.config.run_folder import RunFolder, write_json
from moe_recipes.launch.preflight import container, inputs
from moe_recipes.launch.preflight.clock import clock_server
from moe_recipes.launch.preflight.disk import checkpoint_folder
from moe_recipes.launch.preflight.plan import FOLDER, Plan, is_secret, read_records, recipe_hash, write_plan
from moe_recipes.launch.preflight.probe import JOB, Probe, ProbeFunction, failed, not_available, passed, run_probes
from moe_recipes.launch.preflight.report import Report, make_report
from moe_recipes.launch.slurm.commands import JobFacts
from moe_recipes.launch.slurm.spec import JobSpec, write_spec
from moe_recipes.launch.slurm.srun import spec_path, srun_command, srun_environment, task_environment
from moe_recipes.launch.slurm.timing import check_walltime, estimated_times, measured_times
from moe_recipes.launch.words import most_telling_first

OUTSIDE_LIMIT_S, INSIDE_LIMIT_S = 60.0, 200.0
"""What one step may take, the start of the container included; dead nodes are then known by their silence."""

IMAGE_LIMIT_S = 120.0
KILL_S, POLL_S = 10.0, 0.5
SHARED_FLAGS = ("--jobid=", "--nodes=", "--gres=", "--gpu-bind=", "--mpi=", "--input=")
RESULT = "preflight.json"
MOST_ERRORS = 4
"""pyxis says that the container did not start, that a log follows, and then why."""


def never() -> bool:
    return False


def run_preflight(spec: JobSpec, job: JobFacts, attempt: Path, *, stop: Callable[[], bool] = never) -> Report:
    """Ask every node of the job and write ``RUN/preflight.json``.

    Args:
        attempt: ``RUN/attempts/<n>``; the records go to its ``preflight`` folder.
        stop: true once the job is to end; the steps then end at once.
    Raises:
        CannotWriteError: the run folder cannot be written from this host.
    """
    start = time.monotonic()
    folder = attempt / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{folder}: {error.strerror}; free space, or set another run_dir") from error
    asked_outside = spec.cluster.container.runtime != "none"
    with clock_server() as port:
        plan = make_plan(spec, job, clock_port=port)
        write_plan(folder, plan)
        # A spec of its own: the tasks do this work, and a bad file of secrets is told by its probe, not by their death.
        paths = dataclasses.replace(spec.cluster.paths, secrets=None)
        own = dataclasses.replace(spec, work="preflight", cluster=dataclasses.replace(spec.cluster, paths=paths))
        write_spec(folder / "spec.json", own)
        environment = srun_environment(spec, job, os.environ)
        job_probes = run_probes(host_probes(spec), node=JOB, time_limits_s={"image file": IMAGE_LIMIT_S})
        if asked_outside:
            words = outside_command(spec, job, folder)
            job_probes.append(_start("outside", words, environment, folder, OUTSIDE_LIMIT_S, stop))
        job_probes.append(
            _start("inside", inside_command(spec, job, folder), environment, folder, INSIDE_LIMIT_S, stop)
        )
    report = make_report(
        plan,
        expected_recipe=recipe_hash(spec.recipe),
        job_probes=job_probes,
        outside=read_records(folder, "outside"),
        inside=read_records(folder, "probe"),
        torch=read_records(folder, "torch"),
        wants_outside=asked_outside,
        seconds=time.monotonic() - start,
    )
    shutil.rmtree(checkpoint_folder(Path(plan.run_dir)) / f".preflight-{plan.nonce}", ignore_errors=True)
    write_json(RunFolder(spec.run_dir).path / RESULT, {"job": job.job_id, **report.to_dict()})
    return report


def make_plan(spec: JobSpec, job: JobFacts, *, clock_port: int) -> Plan:
    """The question for the nodes of this job."""
    cluster = spec.cluster
    wanted = {name: value for name, value in task_environment(spec, job).items() if not is_secret(name)}
    return Plan(
        recipe=spec.recipe,
        run_dir=spec.run_dir,
        nodes=job.nodes,
        tasks_per_node=spec.tasks_per_node,
        gpus_per_node=spec.tasks_per_node if cluster.slurm.gpus_per_node else 0,
        nonce=secrets.token_hex(4),
        clock_host=socket.gethostname(),
        clock_port=clock_port,
        environment=wanted,
        runtime=cluster.container.runtime,
        image=cluster.container.image,
        secrets=cluster.paths.secrets,
        limits=cluster_to_dict(cluster)["limits"],
    )


def host_probes(spec: JobSpec) -> dict[str, ProbeFunction]:
    """What the batch host can tell for the whole job."""
    site = spec.cluster.container
    return {
        "ranks": lambda: ranks(spec),
        "container flags": lambda: container.container_flags(site.runtime),
        "image file": lambda: container.image_file(site.image),
        "walltime": lambda: walltime(spec),
        "secrets file on the host": lambda: inputs.secrets_file(spec.cluster.paths.secrets),
    }


def ranks(spec: JobSpec) -> Probe:
    """The job has as many tasks as the recipe has ranks; a preflight may look at other nodes than the run will get."""
    wanted = spec.read_recipe().parallel.num_ranks
    if wanted != spec.num_ranks:
        said = f"{spec.num_nodes} nodes x {spec.tasks_per_node} tasks were looked at; the recipe has {wanted} ranks"
        return not_available(said, value=spec.num_ranks)
    return passed(spec.num_ranks, floor=wanted)


def walltime(spec: JobSpec) -> Probe:
    """The run's time limit holds start-up, one step and one save; the value is the limit in seconds."""
    # The job of a preflight is shorter than the run's, whose limit is the cluster file's.
    limit_s = spec.cluster.time_limit_s if spec.work == "preflight" else spec.time_limit_s
    estimate = estimated_times(spec.read_recipe(), spec.cluster.limits, spec.num_nodes)
    check_walltime(spec.folder, float(limit_s), estimate)
    return passed(limit_s, floor=round(measured_times(spec.folder, estimate).least_walltime_s))


def inside_command(spec: JobSpec, job: JobFacts, folder: Path) -> list[str]:
    """The srun of the run itself, with this preflight's spec and folder."""
    words = srun_command(spec, job, attempt=folder)
    return [str(folder / "spec.json") if word == str(spec_path(spec, job)) else word for word in words]


def outside_command(spec: JobSpec, job: JobFacts, folder: Path) -> list[str]:
    """One task a node, with this host's Python and the same variables, but no container."""
    words = srun_command(spec, job, attempt=folder)
    task = ["-u", "-m", "moe_recipes.launch.preflight.task", str(folder), "--outside"]
    return [
        "srun",
        *(word for word in words if word.startswith((*SHARED_FLAGS, "--export="))),
        f"--ntasks={spec.num_nodes}",
        "--ntasks-per-node=1",
        "--wait=0",
        f"--chdir={spec.code_dir}",
        sys.executable,
        *task,
    ]


def _start(
    side: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    limit_s: float,
    stop: Callable[[], bool],
) -> Probe:
    """Run one step to its end or its time limit; a probe of the job says how it ended."""
    log = folder / f"srun-{side}.log"
    name = f"step {side}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(words), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        code = _wait(process, limit_s, stop)
    if code == 0:
        return dataclasses.replace(passed(), name=name, node=JOB)
    answered = list(folder.glob("outside-*.json" if side == "outside" else "probe-*.json"))
    how = f"srun ended with {code}" if code is not None else f"srun was ended after {limit_s:g} s"
    said = _errors(log)
    probe = failed(f"{how}{f': {said}' if said else ''}; see {log}", value=code)
    if not answered and code is not None:
        # Nothing started anywhere: the image, a mount or the command is wrong, and other nodes would not help.
        probe = dataclasses.replace(probe, exit_code=EXIT_ENVIRONMENT)
    return dataclasses.replace(probe, name=name, node=JOB)


def _wait(process: subprocess.Popen[bytes], limit_s: float, stop: Callable[[], bool]) -> int | None:
    """The exit code; None if the time was over, or the job is to end, and the process had to be ended."""
    deadline = time.monotonic() + limit_s
    try:
        while time.monotonic() < deadline and not stop():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(KILL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _errors(log: Path) -> str:
    """The most telling errors that srun and the container's runtime said, each once, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = dict.fromkeys(re.sub(r"^.*?error: (pyxis: *)?", "", line) for line in lines if "error: " in line)
    return "; ".join(most_telling_first(errors)[:MOST_ERRORS]) or (lines[-1] if lines else "")
