"""What the scripts in slurm/ call: build the job from the allocation's own facts and become the submitit job.

``moe_recipes/launch/slurm/inside.sh [--work WORK] --cluster FILE RECIPE [KEY=VALUE | --set KEY=VALUE ...]``, or with
``--work bench`` what `moe-recipes bench` takes after the recipe.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from moe_recipes.config.cluster import Cluster, load_cluster
from moe_recipes.config.errors import CannotWriteError, EnvironmentMismatchError, MoeRecipesError, RecipeError
from moe_recipes.launch.arguments import add_overrides
from moe_recipes.launch.secrets import read_secrets
from moe_recipes.launch.shakedown import shakedown_mode
from moe_recipes.launch.slurm import excluded
from moe_recipes.launch.slurm.commands import PATIENCE_S, JobFacts, job_facts
from moe_recipes.launch.slurm.job import check_site, make_spec, prepare_folders, run_job, work_of
from moe_recipes.launch.slurm.job_index import note_job, run_of_job
from moe_recipes.launch.slurm.spec import WORKS, JobSpec, read_spec, write_spec
from moe_recipes.launch.words import ERROR_PREFIX, LINE_PREFIX

NO_LIMIT_S = 365 * 24 * 3600
"""Stands for a job without a time limit."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "required: recipe" in message:
            raise RecipeError("export needs the folder of a run: sbatch slurm/export.sh RUN")
        raise RecipeError(f"{message}; write overrides as section.key=value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Does not return where all is well: the process becomes submitit's. Else the error's exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        folder = _prepare(words)
    except MoeRecipesError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    sys.stdout.flush()
    os.environ["SUBMITIT_EXECUTOR"] = "slurm"
    os.execv(sys.executable, [sys.executable, "-u", "-m", "submitit.core._submit", str(folder / "%j")])


def _prepare(words: Sequence[str]) -> Path:
    """Write the spec and the submitit job of this allocation; ``RUN/slurm``."""
    options = _options(words)
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None:
        raise RecipeError("this is no batch job; submit the script: sbatch slurm/NAME.sh")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        raise RecipeError("a job array would start the same run several times; submit single jobs")
    if "SLURM_HET_SIZE" in os.environ:
        raise RecipeError("a heterogeneous job has several node lists, of which one would be used; submit a plain job")
    job = job_facts(job_id, patience_s=PATIENCE_S)
    cluster = load_cluster(options.cluster)
    spec = _earlier_spec(cluster, job)
    if spec is None:
        spec = _spec(options, cluster, job)
    folder = prepare_folders(spec)
    own = folder / job_id / "spec.json"
    write_spec(own, spec)
    if spec.cluster.paths.secrets is not None:
        read_secrets(spec.cluster.paths.secrets)  # refused here, before any task starts
    for line in notes(spec, cluster, job):
        print(f"{LINE_PREFIX}note: {line}", flush=True)
    _write_submitit_job(own, job_id)
    note_job(spec.cluster.paths.runs, job_id, spec.run_dir)
    return folder


def _options(words: Sequence[str]) -> argparse.Namespace:
    """``section.key=value`` alone means ``--set section.key=value``."""
    parser = _Parser(prog="inside.sh")
    parser.add_argument("recipe")
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--work", choices=WORKS, default="train")
    if words[:2] == ["--work", "bench"]:
        parser.add_argument("bench_words", nargs=argparse.REMAINDER)
        options = parser.parse_args(words)
        options.overrides = overrides_among(options.bench_words)
        return options
    parser.set_defaults(bench_words=[])
    add_overrides(parser)
    spelled: list[str] = []
    for word in words:
        bare = "=" in word and not word.startswith("-") and spelled[-1:] != ["--set"]
        spelled += ["--set", word] if bare and spelled[-1:] != ["--cluster"] else [word]
    return parser.parse_args(spelled)


def _earlier_spec(cluster: Cluster, job: JobFacts) -> JobSpec | None:
    """What the job was at its first start: files may have changed since, the job has not."""
    run = run_of_job(cluster.paths.runs, job.job_id) if job.restart_count > 0 else None
    own = None if run is None else run / "slurm" / job.job_id / "spec.json"
    return read_spec(own) if own is not None and own.exists() else None


def _spec(options: argparse.Namespace, cluster: Cluster, job: JobFacts) -> JobSpec:
    check_site(cluster, {"partition": job.partition, "account": job.account, "qos": job.qos}, job=job.job_id)
    num_nodes, tasks_per_node = allocation(os.environ)
    work = work_of(os.environ, default=options.work)
    if work == "bench" and options.work != "bench":
        raise RecipeError("MOE_WORK=bench: a benchmark has its own script: sbatch slurm/bench_qwen3_30b.sh")
    return make_spec(
        options.recipe,
        options.overrides,
        all_cpus(cluster, os.environ) if work == "bench" else fit_cpus(cluster, os.environ, tasks_per_node),
        work=work,
        shakedown=shakedown_mode(os.environ),
        num_nodes=num_nodes,
        tasks_per_node=tasks_per_node,
        time_limit_s=NO_LIMIT_S if job.time_limit_s is None else job.time_limit_s,
        bench_words=options.bench_words,
    )


def overrides_among(words: Sequence[str]) -> list[str]:
    """The recipe's own changes among a benchmark's words, from which its number of ranks follows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_overrides(parser)
    return list(parser.parse_known_args(words)[0].overrides)


def allocation(environ: Mapping[str, str]) -> tuple[int, int]:
    """``(nodes, tasks a node)`` of the batch job.

    Raises:
        RecipeError: not as many tasks on every node.
    """
    text = environ.get("SLURM_TASKS_PER_NODE", "")
    counts = _per_node(text)
    num_nodes = int(environ.get("SLURM_JOB_NUM_NODES", len(counts)))
    if len(set(counts)) != 1 or len(counts) != num_nodes:
        raise RecipeError(
            f"the job has {num_nodes} nodes with {text or 'no'} tasks; every node needs as many: give sbatch"
            " --ntasks-per-node"
        )
    return num_nodes, counts[0]


def fit_cpus(cluster: Cluster, environ: Mapping[str, str], tasks_per_node: int) -> Cluster:
    """The cluster with no more ``cpus_per_task`` than the allocation has: srun would wait for more for ever."""
    cpus = min(_per_node(environ.get("SLURM_JOB_CPUS_PER_NODE", "")), default=0) // tasks_per_node
    if cpus == 0 or cpus >= cluster.slurm.cpus_per_task:
        return cluster
    return replace(cluster, slurm=replace(cluster.slurm, cpus_per_task=cpus))


def all_cpus(cluster: Cluster, environ: Mapping[str, str]) -> Cluster:
    """The cluster with all CPUs of the allocation for a task: a benchmark's only one starts every rank."""
    cpus = min(_per_node(environ.get("SLURM_JOB_CPUS_PER_NODE", "")), default=cluster.slurm.cpus_per_task)
    return replace(cluster, slurm=replace(cluster.slurm, cpus_per_task=cpus))


def _per_node(text: str) -> list[int]:
    """Slurm's ``8(x16),4`` as a list."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


def notes(spec: JobSpec, cluster: Cluster, job: JobFacts) -> list[str]:
    """What an operator should know of this start, one line each."""
    said = []
    cpus, wanted = spec.cluster.slurm.cpus_per_task, cluster.slurm.cpus_per_task
    if cpus < wanted:
        said.append(f"the job has {cpus} CPUs a task, not slurm.cpus_per_task: {wanted}; sbatch --exclusive gives all")
    bad: set[str] = set()
    try:
        bad = {entry.node for entry in excluded.read(spec.cluster.excluded_nodes)}
    except MoeRecipesError as error:
        said.append(str(error))  # somebody's edit of a file of the whole site: no job, and no requeue, may die of it
    if met := sorted(bad & set(job.nodes)):
        said.append(
            f"{', '.join(met)} of this job {'is' if len(met) == 1 else 'are'} in {spec.cluster.excluded_nodes}; next"
            f" time: sbatch --exclude={','.join(sorted(bad))}"
        )
    return said


def _write_submitit_job(spec_file: Path, job_id: str) -> None:
    """The file from which submitit takes the function and its argument, as its executor would have written it.

    Raises:
        EnvironmentMismatchError: this Python has no submitit. CannotWriteError: with the system's reason.
    """
    try:
        from submitit.core.utils import DelayedSubmission
    except ImportError as error:
        raise EnvironmentMismatchError(
            f"{sys.executable} has no submitit; run `make host` in the repository, or set MOE_PYTHON to a Python that"
            " has it"
        ) from error
    path = spec_file.parent / f"{job_id}_submitted.pkl"
    before = os.umask(0o077)
    try:
        DelayedSubmission(run_job, str(spec_file)).dump(path)
    except OSError as error:
        raise CannotWriteError(f"{path}: cannot be written: {error.strerror or error}; free space there") from error
    finally:
        os.umask(before)


if __name__ == "__main__":
    sys.exit(main())
