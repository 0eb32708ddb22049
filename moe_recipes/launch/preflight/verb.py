"""The verb ``preflight``: inside an allocation it asks its nodes, elsewhere it submits a job that does."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from moe_recipes.config.cluster import Cluster, load_cluster, parse_time
from moe_recipes.config.errors import EXIT_OK
from moe_recipes.launch.arguments import add_cluster, add_json, add_overrides, add_recipe
from moe_recipes.launch.preflight.report import table
from moe_recipes.launch.preflight.step import RESULT, run_preflight
from moe_recipes.launch.slurm.commands import job_facts
from moe_recipes.launch.slurm.inside import allocation, fit_cpus
from moe_recipes.launch.slurm.job import make_spec, prepare_folders
from moe_recipes.launch.slurm.spec import JobSpec
from moe_recipes.launch.slurm.submit import sbatch_parameters, submit

TIME = "00:15:00"
"""Time limit of a preflight's own job, queueing apart: short jobs start early."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_cluster(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes; as few as hold the recipe's ranks if not given")
    parser.add_argument(
        "--time", metavar="D-HH:MM:SS", default=TIME, help=f"time limit of the job, {TIME} if not given"
    )
    add_overrides(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    cluster = load_cluster(options.cluster)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        parse_time(options.time)
        return _submit(_spec(options, cluster, options.nodes, None), options)
    num_nodes, tasks_per_node = allocation(os.environ)
    spec = _spec(options, fit_cpus(cluster, os.environ, tasks_per_node), num_nodes, tasks_per_node)
    prepare_folders(spec)
    report = run_preflight(spec, job_facts(job), spec.folder.new_attempt())
    print(json.dumps(report.to_dict()) if options.json else table(report), end="\n" if options.json else "")
    return report.exit_code


def _spec(options: argparse.Namespace, cluster: Cluster, num_nodes: int | None, tasks: int | None) -> JobSpec:
    return make_spec(
        options.recipe,
        options.overrides,
        cluster,
        work="preflight",
        shakedown="off",
        num_nodes=num_nodes,
        tasks_per_node=tasks,
    )


def _submit(spec: JobSpec, options: argparse.Namespace) -> int:
    # Only the job is short: the spec keeps the time limit of the run itself, which the walltime probe is about.
    short = replace(spec, cluster=replace(spec.cluster, slurm=replace(spec.cluster.slurm, time=options.time)))
    job = submit(spec, sbatch_parameters(short))
    log = Path(spec.run_dir) / "slurm" / job / f"{job}_0_log.out"
    result = Path(spec.run_dir) / RESULT
    if options.json:
        print(json.dumps({"job": job, "run": spec.run_dir, "log": str(log), "result": str(result)}))
    else:
        print(f"job {job}: preflight of {spec.num_nodes} nodes\ntable: {log}\nresult: {result}")
    return EXIT_OK
