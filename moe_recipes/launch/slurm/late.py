"""Endings that nobody could write: the node of the supervisor lost power, or Slurm killed it. The next start does."""

from __future__ import annotations

from typing import Any

from moe_recipes.config.errors import MissingInputError, MoeRecipesError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.slurm.causes import Cause, find_cause
from moe_recipes.launch.slurm.commands import OVER, JobRecord, job_facts, nodes_of_partition, sacct_records
from moe_recipes.launch.slurm.ledger import Ledger, durable_step

ACCOUNTING_S = 60.0
"""How long a start waits for the accounting: it only tells the cause better."""


def file_unfinished(
    ledger: Ledger, folder: RunFolder, own_job: str, *, patience_s: float = 0.0
) -> list[tuple[dict[str, Any], Cause]]:
    """Write the missing ``end`` of every start whose supervisor died, from the accounting and what the ranks left.

    Call it before status.json is touched. A start of another job that is still alive, say a preflight beside a run,
    is left alone.

    Args:
        own_job: the job of the start that asks; every start of it that the ledger knows is over.

    Returns:
        The ``end`` records that were added, each with its cause.
    """
    filed = []
    for start in ledger.unfinished():
        job, restart, attempt = str(start["job"]), int(start["restart"]), start.get("attempt")
        if job != own_job and _is_alive(job, restart, patience_s):
            continue
        record = record_of(sacct_records(job, patience_s=min(patience_s, ACCOUNTING_S)), restart)
        cause = _cause(folder, start, record, patience_s)
        end = ledger.append(
            "end",
            job=job,
            restart=restart,
            attempt=attempt,
            nodes=start.get("nodes", []),
            late=True,
            slurm_state=record.state if record is not None else None,
            first_step=start.get("first_step", 0),
            durable_step=durable_step(folder),
            **cause_fields(cause),
        )
        filed.append((end, cause))
    return filed


def cause_fields(cause: Cause) -> dict[str, Any]:
    """A cause as the fields of an ``end`` record."""
    return {
        "exit_code": cause.exit_code,
        "kind": cause.kind,
        "cause": cause.message,
        "rank": cause.rank,
        "node": cause.node,
        "log": cause.log,
        "line": cause.line,
    }


def record_of(records: list[JobRecord], restart: int) -> JobRecord | None:
    """The accounting of one start of a job; None where it has none, or where that start is not over."""
    record = records[restart] if restart < len(records) else None
    return record if record is not None and record.state in (*OVER, "REQUEUED") else None


def _is_alive(job: str, restart: int, patience_s: float) -> bool:
    try:
        facts = job_facts(job, patience_s=patience_s)
    except MissingInputError:
        return False
    return facts.state not in OVER and facts.restart_count == restart


def _cause(folder: RunFolder, start: dict[str, Any], record: JobRecord | None, patience_s: float) -> Cause:
    attempt = folder.attempts / str(start.get("attempt"))
    trained = start.get("work", "train") == "train"
    state = record.state if record is not None else None
    cause = find_cause(folder, attempt, slurm_state=state, uses_status=None if trained else False)
    if cause.kind == "node_failure" and cause.node is None and record is not None:
        down = _down_nodes(record.partition, set(start.get("nodes", [])), patience_s)
        if len(down) == 1:
            return Cause(kind="node_failure", exit_code=cause.exit_code, message=f"node {down[0]} failed", node=down[0])
    return cause


def _down_nodes(partition: str, nodes: set[str], patience_s: float) -> list[str]:
    try:
        known = nodes_of_partition(partition, patience_s=patience_s)
    except MoeRecipesError:
        return []
    return [node.name for node in known if node.name in nodes and node.state.startswith(("down", "fail"))]
