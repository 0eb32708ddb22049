"""A preflight inside a supervised job: the report as the cause of an attempt's end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_recipes.config.errors import EXIT_INFRASTRUCTURE, EXIT_OK, MoeRecipesError
from moe_recipes.launch.preflight.probe import JOB, Probe
from moe_recipes.launch.preflight.report import Report, table
from moe_recipes.launch.preflight.step import RESULT, run_preflight
from moe_recipes.launch.slurm import excluded
from moe_recipes.launch.slurm.causes import KIND_OF_CODE, Cause
from moe_recipes.launch.slurm.commands import JobFacts
from moe_recipes.launch.slurm.spec import JobSpec
from moe_recipes.launch.words import LINE_PREFIX


def preflight_cause(spec: JobSpec, job: JobFacts, attempt: Path, *, stop: Callable[[], bool]) -> Cause:
    """Ask the nodes, print the table, and say how it ended. In a job that trains, all failed nodes go into the file
    of bad nodes; a job that only asks changes nothing.

    Args:
        stop: true once Slurm ends the job.
    Raises:
        CannotWriteError: the run folder cannot be written.
    """
    report = run_preflight(spec, job, attempt, stop=stop)
    print(table(report), end="", flush=True)
    if spec.work != "preflight" and report.exit_code == EXIT_INFRASTRUCTURE and not stop():
        for node in report.excluded[1:]:  # the first one is the cause's, which the supervisor files
            reason = f"preflight: {_said(report.failures(node)[0])}"
            hours = spec.cluster.limits.exclude_hours
            try:
                excluded.add(spec.cluster.excluded_nodes, node, reason=reason, job=job.job_id, hours=hours)
            except MoeRecipesError as error:
                print(f"{LINE_PREFIX}note: {node} is not in the list of excluded nodes: {error}", flush=True)
    return Cause(
        kind=KIND_OF_CODE[report.exit_code],
        exit_code=report.exit_code,
        message=f"{message_of(report)}; all answers: {Path(spec.run_dir) / RESULT}",
        node=report.excluded[0] if report.excluded else None,
    )


def message_of(report: Report) -> str:
    """The report on one line: the failure that gave the exit code, and how many there are."""
    if report.exit_code == EXIT_OK:
        return f"preflight: {len(report.nodes)} nodes passed"
    failures = [probe for probe in report.probes if probe.verdict == "fail"]
    first = next((p for p in failures if report.code_of(p) == report.exit_code), failures[0])
    where = "" if first.node == JOB else f" on {first.node}"
    more = f" ({len(failures)} probes failed)" if len(failures) > 1 else ""
    return f"preflight{where}: {_said(first)}{more}"


def _said(probe: Probe) -> str:
    return f"{probe.name}: {probe.message}"
