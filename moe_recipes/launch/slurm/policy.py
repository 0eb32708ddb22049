"""What happens after an attempt: pure, from its cause, the ledger and the limits. docs/exit-codes.md has the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_recipes.config.cluster import Limits
from moe_recipes.config.errors import EXIT_DO_NOT_REQUEUE, EXIT_OK
from moe_recipes.launch.slurm.causes import Cause, Kind

Action = Literal["done", "requeue", "hold", "fail"]
NEVER_REQUEUED: tuple[Kind, ...] = (
    "not_finite",
    "out_of_memory",
    "user_error",
    "environment",
    "cannot_write",
    "corrupt",
)
"""Would end alike again: somebody has to change something first."""

BLAMES_NODE: tuple[Kind, ...] = ("node_failure", "infrastructure", "hang")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the supervisor does next."""

    action: Action
    exit_code: int
    """Of the batch script."""

    exclude: str | None
    """A node that the next attempts must not get."""

    reason: str


def decide(cause: Cause, records: Sequence[dict[str, Any]], limits: Limits) -> Decision:
    """Decide what follows an attempt.

    Args:
        records: the ledger, with the ``end`` of this attempt as its last one.
    """
    exclude = cause.node if cause.kind in BLAMES_NODE else None
    if cause.kind == "done":
        return Decision(action="done", exit_code=EXIT_OK, exclude=None, reason=cause.message)
    if cause.kind == "stopped_by_operator":
        return Decision(action="fail", exit_code=EXIT_DO_NOT_REQUEUE, exclude=None, reason=cause.message)
    if cause.kind in NEVER_REQUEUED:
        reason = f"{cause.message} (exit code {cause.exit_code}: not requeued, it would end alike)"
        return Decision(action="fail", exit_code=cause.exit_code, exclude=None, reason=reason)
    vain, limit = restarts_without_progress(records), limits.max_restarts_without_progress
    if vain >= limit:
        reason = f"{vain} restarts without a newer durable step; the last: {cause.message}"
        return Decision(action="hold", exit_code=EXIT_DO_NOT_REQUEUE, exclude=exclude, reason=reason)
    return Decision(action="requeue", exit_code=cause.exit_code, exclude=exclude, reason=cause.message)


def restarts_without_progress(records: Sequence[dict[str, Any]]) -> int:
    """How many of the newest restarts in a row left no newer durable step.

    Counted within one job. Its first attempt is no restart, and neither is the one after an operator has released
    the job: both say that somebody looked.
    """
    if not records:
        return 0
    job = records[-1].get("job")
    attempts: dict[Any, dict[str, Any]] = {}
    for record in records:
        if record.get("job") != job:
            continue
        if record["event"] == "hold":
            attempts = {}
        elif record["event"] == "end":
            # By start: where a node lost the network, its supervisor and the next start both wrote how it ended.
            attempts[record.get("restart"), record.get("attempt")] = record
    vain = 0
    for record in reversed([*attempts.values()][1:]):
        if _step(record, "durable_step") > _step(record, "first_step"):
            return vain
        vain += 1
    return vain


def _step(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    return value if isinstance(value, int) else 0
