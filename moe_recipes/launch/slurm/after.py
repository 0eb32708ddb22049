"""After the ranks have ended: what Slurm says of the job, and what is asked of Slurm."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from moe_recipes.config.errors import MissingInputError, MoeRecipesError
from moe_recipes.launch.slurm import commands, excluded
from moe_recipes.launch.slurm.commands import JobFacts
from moe_recipes.launch.slurm.endings import LATE_FILES_S, missing_endings
from moe_recipes.launch.slurm.late import record_of
from moe_recipes.launch.slurm.ledger import Event, Record
from moe_recipes.launch.slurm.policy import Decision
from moe_recipes.launch.slurm.spec import JobSpec

VERDICT_S = 10.0
"""How long the accounting may take to say why Slurm ends a job."""

EXCLUDE_S = 20.0
"""How long the scheduler may take to let go of a requeued job, so that its excluded nodes can be set."""


class Speaker(Protocol):
    """The start that a decision is about."""

    spec: JobSpec
    job_id: str
    restart: int

    def write(self, event: Event, **fields: Any) -> Record: ...


def wait_for_endings(attempt: Path, srun_code: int | None, *, stop: Callable[[], bool]) -> None:
    """Wait until this host sees what the ranks of other nodes left, on a file system that shows files late: a missing
    ending would be read as a task that never started, and its node would be blamed.

    Args:
        stop: true once Slurm ends the job; then there is no time.
    """
    deadline = time.monotonic() + LATE_FILES_S
    while missing_endings(attempt, srun_code) and time.monotonic() < deadline and not stop():
        time.sleep(0.5)


def slurm_state(facts: JobFacts, restart: int, *, is_ending: bool) -> tuple[str | None, JobFacts]:
    """Why Slurm ends this start of the job: CANCELLED, PREEMPTED, REQUEUED, NODE_FAIL, TIMEOUT ...; None where it does
    not. scontrol shows only COMPLETING then, so the accounting is asked.

    Args:
        is_ending: this process got SIGTERM, so Slurm does.
    Returns:
        The state, and fresh facts.
    """
    try:
        facts = commands.job_facts(facts.job_id, patience_s=commands.PATIENCE_S)
    except MissingInputError:
        return "CANCELLED", facts
    running = facts.state == "RUNNING" and facts.restart_count == restart
    if running and not is_ending:
        return None, facts
    if facts.reason == "TimeLimit":
        return "TIMEOUT", facts
    deadline = time.monotonic() + VERDICT_S
    while True:
        record = record_of(commands.sacct_records(facts.job_id), restart)
        if record is not None:
            return record.state, facts
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if facts.restart_count > restart:
        return "REQUEUED", facts
    # Without an accounting. To ask for a requeue now would raise a job that somebody has cancelled.
    return (None if running else "CANCELLED"), facts


def carry_out(start: Speaker, decision: Decision, facts: JobFacts) -> int:
    """Do what was decided; the batch script's exit code.

    Everything is in the ledger before Slurm is asked: its answer to a requeue is SIGTERM, and SIGKILL after KillWait.
    """
    exclude = exclude_later_jobs(start, decision, facts) if decision.action in ("requeue", "hold") else None
    if decision.action == "requeue":
        start.write("requeue", exit_code=decision.exit_code, reason=decision.reason, exclude=exclude)
        if facts.restart_count == start.restart:  # else Slurm has done it
            _ask(start, "requeue", lambda: commands.requeue(start.job_id))
    elif decision.action == "hold":
        start.write("hold", exit_code=decision.exit_code, reason=decision.reason, exclude=exclude)
        _ask(start, "hold", lambda: commands.requeue_hold(start.job_id, f"moe-recipes: {decision.reason}"))
    elif decision.action == "fail":
        reason = f"moe-recipes: {decision.reason}"
        _ask(start, "comment", lambda: commands.set_comment(start.job_id, reason, patience_s=0.0))
    if exclude is not None:
        _exclude_this_job(start, {*facts.exclude, exclude})
    return decision.exit_code


def _ask(start: Speaker, what: str, request: Callable[[], None]) -> None:
    try:
        request()
    except MoeRecipesError as error:
        if what in ("requeue", "hold") and _is_requeued(start):
            return  # Slurm was quicker than its own answer, or an operator than this process
        start.write("note", reason=f"{what} was refused: {error}")


def _is_requeued(start: Speaker) -> bool:
    try:
        return commands.job_facts(start.job_id, patience_s=60.0).restart_count > start.restart
    except MoeRecipesError:
        return False


def _node_name(host: str | None, facts: JobFacts) -> str | None:
    """Slurm's name of a host that gave its name with or without a domain."""
    if host is None or host in facts.nodes:
        return host
    short = host.split(".")[0]
    return next((name for name in facts.nodes if name.split(".")[0] == short), host)


def _enough_without(avoided: set[str], facts: JobFacts) -> bool:
    """The partition has as many usable nodes as the job needs without those."""
    try:
        known = commands.nodes_of_partition(facts.partition, patience_s=60.0)
    except MoeRecipesError:
        return False
    usable = {node.name for node in known if not node.state.startswith(("down", "drain", "fail", "unk", "inval"))}
    return len(usable - avoided) >= facts.num_nodes


def exclude_later_jobs(start: Speaker, decision: Decision, facts: JobFacts) -> str | None:
    """Put the bad node into the site's list.

    Returns:
        Slurm's name of the node; None where there is none, or where the partition has no spare one.
    """
    node = _node_name(decision.exclude, facts)
    if node is None:
        return None
    if not _enough_without({*facts.exclude, node}, facts):
        start.write("note", reason=f"{node} is not excluded: the partition has no spare node")
        return None
    cluster = start.spec.cluster
    hours = cluster.limits.exclude_hours
    if hours > 0:
        try:
            excluded.add(cluster.excluded_nodes, node, reason=decision.reason, job=start.job_id, hours=hours)
        except MoeRecipesError as error:
            start.write("note", reason=f"{node} is not in the list of excluded nodes: {error}")
    return node


def _exclude_this_job(start: Speaker, nodes: set[str]) -> None:
    """Slurm takes the list for a job that waits, which a requeued one does only after a moment."""
    deadline, refused = time.monotonic() + EXCLUDE_S, ""
    while time.monotonic() < deadline:
        try:
            commands.exclude_nodes(start.job_id, nodes)
        except MoeRecipesError as error:
            refused = str(error)
            time.sleep(0.5)
        else:
            return
    start.write("note", reason=f"{','.join(sorted(nodes))} could not be excluded from job {start.job_id}: {refused}")
