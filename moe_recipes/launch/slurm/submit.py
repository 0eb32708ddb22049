"""The verb ``launch``: submit a recipe to Slurm through submitit, or show what would be submitted."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_recipes.config.cluster import load_cluster, parse_time
from moe_recipes.config.errors import EXIT_OK, EXIT_RECIPE, EnvironmentMismatchError, InfrastructureError, RecipeError
from moe_recipes.launch.arguments import add_cluster, add_json, add_overrides, add_recipe
from moe_recipes.launch.secrets import mask, read_secrets
from moe_recipes.launch.shakedown import shakedown_mode
from moe_recipes.launch.slurm import excluded
from moe_recipes.launch.slurm.commands import (
    AWAY,
    KEPT_VARIABLES,
    JobFacts,
    SlurmRefusedError,
    clean_environment,
    run_slurm,
    slurm_said,
)
from moe_recipes.launch.slurm.job import (
    BACKSTOP_S,
    EXPORTED,
    SITE_NAMES,
    check_site,
    make_spec,
    prepare_folders,
    run_job,
    work_of,
)
from moe_recipes.launch.slurm.job_index import note_job
from moe_recipes.launch.slurm.spec import WORKS, JobSpec, write_spec
from moe_recipes.launch.slurm.srun import srun_command, task_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_cluster(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes; as few as hold the recipe's ranks if not given")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="time limit; the cluster file's if not given")
    parser.add_argument("--dependency", metavar="TEXT", help="sbatch's --dependency, say afterok:1234")
    parser.add_argument("--work", choices=WORKS, help="what the job does; train if not given (export takes a RUN)")
    parser.add_argument("--shakedown", action="store_true", help="few layers, random weights, a kill and a resume")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--dry-run", action="store_true", help="print the script and the srun line, submit nothing")
    asked.add_argument("--test-only", action="store_true", help="ask the scheduler, submit nothing")
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    spec = _spec(options)
    secrets = read_secrets(spec.cluster.paths.secrets) if spec.cluster.paths.secrets is not None else {}
    parameters = sbatch_parameters(spec, dependency=options.dependency)
    if options.dry_run:
        text = mask(dry_run_text(spec, parameters), secrets)
        print(json.dumps({"run": spec.run_dir, "dry_run": text}) if options.json else text.rstrip("\n"))
        return EXIT_OK
    if options.test_only:
        return _test_only(spec, parameters, as_json=options.json)
    job = submit(spec, parameters)
    log = Path(spec.run_dir) / "slurm" / job / f"{job}_0_log.out"
    if options.json:
        print(json.dumps({"job": job, "run": spec.run_dir, "log": str(log)}))
    else:
        print(f"job {job}: {spec.num_nodes} nodes x {spec.tasks_per_node} tasks\nrun: {spec.run_dir}\nlog: {log}")
    return EXIT_OK


def _spec(options: argparse.Namespace) -> JobSpec:
    cluster = load_cluster(options.cluster)
    check_site(cluster, {name: os.environ.get(f"SBATCH_{name.upper()}") for name in SITE_NAMES}, job=None)
    if options.time is not None:
        parse_time(options.time)
        cluster = replace(cluster, slurm=replace(cluster.slurm, time=options.time))
    if options.dependency is not None and not re.fullmatch(r"[\w:,?+-]+", options.dependency):
        raise RecipeError(f"--dependency={options.dependency!r}: write it as sbatch does, for example afterok:1234")
    if options.nodes is not None and options.nodes < 1:
        raise RecipeError(f"--nodes={options.nodes} must be at least 1")
    mode, work = shakedown_mode(os.environ), options.work or work_of(os.environ)
    if work == "bench":
        raise RecipeError("a benchmark is submitted as a script: sbatch slurm/bench_qwen3_30b.sh")
    return make_spec(
        options.recipe,
        options.overrides,
        cluster,
        work=work,
        shakedown="full" if options.shakedown and mode == "off" else mode,
        num_nodes=options.nodes,
    )


def sbatch_parameters(spec: JobSpec, *, dependency: str | None = None) -> dict[str, Any]:
    """The parameters of submitit's executor: the job as ``slurm/*.sh`` has it, and the site's facts.

    Raises:
        RecipeError: ``slurm.extra`` sets an option that has a key of its own.
    """
    slurm = spec.cluster.slurm
    further: dict[str, Any] = {
        "time": slurm.time,
        "signal": f"B:USR2@{BACKSTOP_S}",
        "requeue": True,
    }
    if slurm.reservation is not None:
        further["reservation"] = slurm.reservation
    if slurm.gpus_per_node:
        further["gpus-per-node"] = f"{slurm.gpu_type}:{spec.tasks_per_node}" if slurm.gpu_type else spec.tasks_per_node
    bad = sorted({entry.node for entry in excluded.read(spec.cluster.excluded_nodes)})
    known: dict[str, Any] = {
        "job_name": Path(spec.run_dir).name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": spec.num_nodes,
        "ntasks_per_node": spec.tasks_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "exclusive": True if slurm.exclusive else None,
        "exclude": ",".join(bad) or None,
        "dependency": dependency,
        "wckey": None,
    }
    for option in slurm.extra:
        name, equals, value = option.removeprefix("--").partition("=")
        if name in {*further, *(key.replace("_", "-") for key in known)}:
            raise RecipeError(f"slurm.extra has {option!r} in cluster {spec.cluster.name!r}; --{name} has another key")
        further[name] = value if equals else True
    return {
        **known,
        "setup": [f"cd {shlex.quote(spec.code_dir)} || exit 66"],
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": further,
    }


def submit(spec: JobSpec, parameters: dict[str, Any]) -> str:
    """Submit the job; its id.

    Raises:
        EnvironmentMismatchError: no submitit, or no Slurm, on this host.
        InfrastructureError: the scheduler does not answer.
        SlurmRefusedError: sbatch said no; the message is Slurm's.
    """
    if shutil.which("sbatch") is None:
        raise EnvironmentMismatchError("this host has no sbatch; run this where Slurm's commands are in PATH")
    folder = prepare_folders(spec)
    executor = _executor(folder, parameters)
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    path = folder / f".spec-{uuid.uuid4().hex}.json"
    write_spec(path, spec)
    present = {*folder.iterdir()}
    try:
        # submitit repeats what sbatch said, which is in the error as well.
        with _submitting_environment(), redirect_stderr(io.StringIO()):
            job = str(executor.submit(run_job, str(path)).job_id)
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        for left in ({*folder.iterdir()} - present) | {path}:  # submitit leaves the script of a refused submission
            if left.is_file():
                left.unlink()
        said = _refusal(error)
        if AWAY.search(said):
            raise InfrastructureError(f"sbatch: the scheduler does not answer now: {said}; try again later") from error
        raise SlurmRefusedError(f"sbatch: {said}") from error
    # RUN/slurm is closed to others already. A umask around sbatch would go along into the job and all that it writes.
    (folder / job).chmod(0o700)
    for written in (folder / job).glob(f"{job}_subm*"):
        written.chmod(0o600)
    note_job(spec.cluster.paths.runs, job, spec.run_dir)
    return job


def _refusal(error: Exception) -> str:
    stderr = getattr(error, "stderr", None) or getattr(error.__cause__, "stderr", None)
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or str(error)
    return slurm_said("\n".join(line for line in text.splitlines() if "sbatch: " in line) or text)


def _executor(folder: Path, parameters: dict[str, Any]) -> Any:
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise EnvironmentMismatchError(
            f"{sys.executable} has no submitit; run `make host` and use .host/bin/moe-recipes, or install"
            " moe-recipes[slurm]"
        ) from error

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no Slurm here

    executor = Executor(folder=folder / "%j", python=shlex.quote(job_python()))
    executor.update_parameters(**parameters)
    return executor


def job_python() -> str:
    """The host Python of the job: ``MOE_PYTHON``, else the one that runs this."""
    return os.environ.get("MOE_PYTHON") or sys.executable


def submit_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What sbatch is started with, and so what the job gets: nothing of another job, and no exported key.

    No ``--export=NAMES`` as in the scripts, which start sbatch with a whole shell: with that, Slurm would load the
    user's login environment on the batch host, which takes seconds and may fail.
    """
    return {name: value for name, value in clean_environment(environ).items() if name in (*EXPORTED, *KEPT_VARIABLES)}


@contextmanager
def _submitting_environment() -> Iterator[None]:
    """submitit starts sbatch with this process's environment."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(submit_environment(before))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def script_text(spec: JobSpec, parameters: dict[str, Any]) -> str:
    """The batch script, as submitit writes it."""
    executor = _executor(Path(spec.run_dir) / "slurm", parameters)
    return str(executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex))


def dry_run_text(spec: JobSpec, parameters: dict[str, Any]) -> str:
    """The script, and the srun line that the supervisor will start, with stand-ins for what only the job knows."""
    job = JobFacts(
        job_id="JOB",
        name="",
        state="PENDING",
        nodes=("FIRST_NODE",),
        num_nodes=spec.num_nodes,
        start_time=None,
        end_time=None,
        time_limit_s=spec.time_limit_s,
        restart_count=0,
        partition=spec.cluster.slurm.partition,
        account=None,
        qos=None,
        reason=None,
        exclude=(),
        comment=None,
        batch_host=None,
    )
    words = srun_command(spec, job, attempt=Path(spec.run_dir) / "attempts" / "N")
    named = {**task_environment(spec, job), "MOE_MASTER_PORT": "PORT"}
    variables = "".join(f"{name}={shlex.quote(value)}\n" for name, value in named.items())
    return (
        f"{script_text(spec, parameters).rstrip()}\n\n# sbatch gets these variables of the shell, where they are set:\n"
        f"# {' '.join((*EXPORTED, *KEPT_VARIABLES))}\n\n# The job starts this, once an attempt:\n"
        f"{' '.join(shlex.quote(word) for word in words)}\n\n# with these variables, and no other of the host's:\n"
        f"{variables}"
    )


def _test_only(spec: JobSpec, parameters: dict[str, Any], *, as_json: bool) -> int:
    """sbatch --test-only: the scheduler's own answer, and its verdict as exit code 0 or 64."""
    with tempfile.NamedTemporaryFile("w", prefix="moe-recipes-", suffix=".sh") as script:
        script.write(script_text(spec, parameters))
        script.flush()
        done = run_slurm(["sbatch", "--test-only", script.name], environ=submit_environment(os.environ))
    said = slurm_said(done.stdout + done.stderr)
    code = EXIT_OK if done.returncode == 0 else EXIT_RECIPE
    if as_json:
        print(json.dumps({"would_start": code == EXIT_OK, "scheduler": said, "exit_code": code}))
        return code
    if code != EXIT_OK:
        raise SlurmRefusedError(f"sbatch: {said}")
    print(said)
    return code
