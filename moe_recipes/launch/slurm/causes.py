"""The first cause of an attempt's end, not the cascade that it set off.

One rank that dies takes all others with it: they complain about closed connections, and srun kills what is left. Here
the one that was first is told from those that followed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from moe_recipes.config import errors
from moe_recipes.config.run_folder import TERMINAL_STATES, RunFolder
from moe_recipes.launch.slurm.endings import (
    CASCADE_S,
    SRUN_LOG,
    RankEnd,
    SrunWords,
    log_of,
    read_rank_ends,
    read_srun_words,
    started_ranks,
)
from moe_recipes.launch.words import NOT_THERE, last_line, most_telling_first

Kind = Literal[
    "done",
    "preempted",
    "time_limit",
    "node_failure",
    "hang",
    "out_of_memory",
    "not_finite",
    "user_error",
    "stopped_by_operator",
    "cannot_write",
    "corrupt",
    "environment",
    "infrastructure",
    "internal",
]
KIND_OF_CODE: dict[int, Kind] = {
    errors.EXIT_OK: "done",
    errors.EXIT_NOT_FINITE: "not_finite",
    errors.EXIT_DOES_NOT_FIT: "out_of_memory",
    errors.EXIT_RECIPE: "user_error",
    errors.EXIT_DATA: "user_error",
    errors.EXIT_MISSING_INPUT: "user_error",
    errors.EXIT_INFRASTRUCTURE: "infrastructure",
    errors.EXIT_INTERNAL: "internal",
    errors.EXIT_CANNOT_WRITE: "cannot_write",
    errors.EXIT_CORRUPT_CHECKPOINT: "corrupt",
    errors.EXIT_REQUEUE: "preempted",
    errors.EXIT_SECRETS: "user_error",
    errors.EXIT_ENVIRONMENT: "environment",
}
DEFINITE = tuple(
    code
    for code in KIND_OF_CODE
    if code not in (0, errors.EXIT_INFRASTRUCTURE, errors.EXIT_INTERNAL, errors.EXIT_REQUEUE)
)
"""Codes by which a rank says exactly what is wrong. Never the echo of another rank's end."""

STOPS = ("SIGTERM", "SIGUSR2", "SIGKILL")
"""What Slurm and the supervisor send to end a step."""

_NETWORK = re.compile(
    r"connection (closed|reset|refused)|broken pipe|NCCL|DistBackendError|DistStoreError|DistNetworkError|gloo"
    r"|no route to host|timed out waiting|CUDA error|ECC|Xid|IBV_|NVSHMEM",
    re.IGNORECASE,
)
_MISSING_PACKAGE = re.compile(r"ModuleNotFoundError|ImportError|No module named")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an attempt ended."""

    kind: Kind
    exit_code: int
    message: str
    rank: int | None = None
    node: str | None = None
    log: str | None = None
    line: int | None = None
    """Line of the log that says it, from 1."""


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    folder: RunFolder
    attempt: Path
    srun_code: int | None
    slurm_state: str | None
    asked: str | None
    status: dict[str, Any]
    ends: list[RankEnd]
    words: SrunWords

    def cause(self, kind: Kind, code: int, message: str, *, rank: int | None = None, node: str | None = None) -> Cause:
        """With the log of the rank, or srun's where no rank is named."""
        log = self.attempt / SRUN_LOG if rank is None else log_of(self.attempt, rank)
        line = last_line(log) if log is not None else None
        if node is None and rank is not None:
            node = next((end.node for end in self.ends if end.rank == rank), None)
        found = str(log) if log is not None and line is not None else None
        number = line.number if line is not None else None
        return Cause(kind=kind, exit_code=code, message=message, rank=rank, node=node, log=found, line=number)


def find_cause(
    folder: RunFolder,
    attempt: Path,
    srun_code: int | None = None,
    *,
    slurm_state: str | None = None,
    asked: str | None = None,
    uses_status: bool | None = None,
) -> Cause:
    """Name the first cause of an attempt's end from what it left: status.json, the ranks' ends and logs, srun's words.

    Args:
        srun_code: exit code of srun; None where nobody saw it.
        slurm_state: what Slurm says of this start of the job: CANCELLED, PREEMPTED, NODE_FAIL, TIMEOUT ...
        asked: why the supervisor itself asked the ranks to stop: ``time_limit``, ``hang``.
        uses_status: status.json is about this attempt; an export does not report there. Not given: so it is if no
            attempt is newer.
    """
    counts = _is_newest(attempt) if uses_status is None else uses_status
    status = (folder.read_status() or {}) if counts else {}
    if status.get("state") not in TERMINAL_STATES:
        status = {}
    seen = _Evidence(
        folder=folder,
        attempt=attempt,
        srun_code=srun_code,
        slurm_state=slurm_state,
        asked=asked,
        status=status,
        ends=read_rank_ends(attempt),
        words=read_srun_words(attempt),
    )
    for judge in (_done, _definite, _slurm, _hang, _saved, _never_started, _killed, _complained):
        if (cause := judge(seen)) is not None:
            return cause
    code = "an unknown code" if srun_code is None else f"code {srun_code}"
    return seen.cause("infrastructure", errors.EXIT_INFRASTRUCTURE, f"the step ended with {code}, and no rank said why")


def _is_newest(attempt: Path) -> bool:
    numbers = [int(item.name) for item in attempt.parent.glob("*") if item.name.isdigit()]
    return attempt.name.isdigit() and int(attempt.name) == max(numbers, default=-1)


def _done(seen: _Evidence) -> Cause | None:
    state, code = seen.status.get("state"), seen.status.get("exit_code")
    if state in ("done", "stopped") and code == errors.EXIT_OK:
        message = "done" if state == "done" else "stopped as asked by the file STOP; saved"
        return Cause(kind="done", exit_code=errors.EXIT_OK, message=message)
    # srun of some releases ends with 0 where Slurm could not start a single task.
    started = bool(seen.ends) and not any("launch failed" in line for line in seen.words.errors)
    if seen.srun_code == errors.EXIT_OK and started and not any(end.failed for end in seen.ends):
        return Cause(kind="done", exit_code=errors.EXIT_OK, message="done")
    return None


def _definite(seen: _Evidence) -> Cause | None:
    """A rank said exactly what is wrong, before anything else could go wrong."""
    if seen.status.get("exit_code") in DEFINITE:
        return _from_status(seen)
    for end in (*seen.ends, *seen.words.ends):
        if end.exit_code in DEFINITE:
            return _from_end(seen, end)
    return None


def _from_status(seen: _Evidence) -> Cause:
    code, rank = int(seen.status["exit_code"]), seen.status.get("rank")
    message = str(seen.status.get("cause") or seen.status["state"])
    known = next((end.node for end in seen.ends if end.rank == rank), None)  # the status may come from another rank
    return seen.cause(
        KIND_OF_CODE.get(code, "internal"), code, message, rank=rank, node=known or seen.status.get("host")
    )


def _from_end(seen: _Evidence, end: RankEnd) -> Cause:
    log = log_of(seen.attempt, end.rank)
    if log is None and end.cause is None and started_ranks(seen.attempt):
        said = most_telling_first(seen.words.errors)[0] if seen.words.errors else f"exited with code {end.exit_code}"
        message = f"the task of rank {end.rank} did not start on {end.node}, others did: {said}"
        return Cause(
            kind="infrastructure", exit_code=errors.EXIT_INFRASTRUCTURE, message=message, rank=end.rank, node=end.node
        )
    line = last_line(log) if log is not None else None
    unlogged = seen.words.missing_package or f"exited with code {end.exit_code}"
    said = end.cause or (line.text if line is not None else unlogged)
    code, kind = _judge(end.exit_code or errors.EXIT_INTERNAL, said)
    return seen.cause(kind, code, f"rank {end.rank}: {said}", rank=end.rank, node=end.node)


def _judge(code: int, said: str) -> tuple[int, Kind]:
    """Code and kind of a rank's own exit code. A traceback (70, or Python's 1) may come from the network or a GPU."""
    if code in KIND_OF_CODE and code != errors.EXIT_INTERNAL:
        return code, KIND_OF_CODE[code]
    if _MISSING_PACKAGE.search(said) or code in (126, 127):
        return errors.EXIT_ENVIRONMENT, "environment"
    if _NETWORK.search(said):
        return errors.EXIT_INFRASTRUCTURE, "infrastructure"
    return errors.EXIT_INTERNAL, "internal"


def _slurm(seen: _Evidence) -> Cause | None:
    """What only Slurm knows: a dead node, a cancelled job, memory of the host."""
    words, state = seen.words, seen.slurm_state
    if words.out_of_memory or state == "OUT_OF_MEMORY":
        end = next((end for end in seen.ends if end.signal == "SIGKILL"), None)
        message = "out of host memory: Slurm's limit killed a rank; ask for more (slurm.mem), or lower data workers"
        return seen.cause("out_of_memory", errors.EXIT_DOES_NOT_FIT, message, rank=end.rank if end else None)
    if words.failed_node or state in ("NODE_FAIL", "BOOT_FAIL") or words.why_cancelled == "NODE FAILURE":
        node = words.failed_node
        message = f"node {node} failed" if node else "a node failed"
        return seen.cause("node_failure", errors.EXIT_INFRASTRUCTURE, message, node=node)
    if state == "CANCELLED":
        saved = "; saved" if _has_saved(seen) else ""
        return seen.cause("stopped_by_operator", errors.EXIT_REQUEUE, f"cancelled by an operator{saved}")
    return None


def _hang(seen: _Evidence) -> Cause | None:
    if seen.asked != "hang":
        return None
    return seen.cause("hang", errors.EXIT_INTERNAL, "no progress; the stacks of all ranks are in their logs")


def _has_saved(seen: _Evidence) -> bool:
    return seen.status.get("exit_code") == errors.EXIT_REQUEUE or any(
        end.exit_code == errors.EXIT_REQUEUE for end in seen.ends
    )


def _why_stopped(seen: _Evidence) -> tuple[Kind, str] | None:
    """Who asked the ranks to stop, if anybody did."""
    if seen.asked == "time_limit" or seen.slurm_state == "TIMEOUT" or seen.words.why_cancelled == "TIME LIMIT":
        return "time_limit", "the time limit came near" if seen.asked == "time_limit" else "the time limit came"
    if seen.asked or seen.slurm_state in ("PREEMPTED", "REQUEUED"):
        return "preempted", "preempted or requeued by Slurm or an operator"
    if seen.words.why_cancelled in ("PREEMPTION", "JOB REQUEUE"):
        return "preempted", "preempted or requeued by Slurm or an operator"
    return None


def _saved(seen: _Evidence) -> Cause | None:
    if not _has_saved(seen):
        return None
    kind, why = _why_stopped(seen) or ("preempted", str(seen.status.get("cause") or "a signal came"))
    step = seen.status.get("last_durable_step")
    saved = f"; saved after step {step}" if step else "; saved"
    return seen.cause(kind, errors.EXIT_REQUEUE, why if "saved" in why else f"{why}{saved}")


def _never_started(seen: _Evidence) -> Cause | None:
    """No task came up: the container or srun itself."""
    if not seen.words.errors or seen.ends or started_ranks(seen.attempt) or _why_stopped(seen) is not None:
        return None
    said = most_telling_first(seen.words.errors)[0]
    if "Unable to create step" in said or "Communication connection failure" in said:
        return seen.cause("infrastructure", errors.EXIT_INFRASTRUCTURE, f"srun: {said}")
    if NOT_THERE.search(said):
        return seen.cause("user_error", errors.EXIT_MISSING_INPUT, f"srun: {said}")
    return seen.cause("environment", errors.EXIT_ENVIRONMENT, f"srun: {said}")


def _killed(seen: _Evidence) -> Cause | None:
    """A signal ended a rank. It hides the complaints of the others, which may carry an earlier time."""
    failed = [end for end in seen.ends if end.failed]
    others = [end.time for end in failed if end.signal is None]
    first = next(
        (
            end
            for end in failed
            if end.signal is not None and (not others or _seconds(end.time) <= _seconds(min(others)) + CASCADE_S)
        ),
        None,
    ) or next((end for end in seen.words.ends if end.signal is not None and not failed), None)
    stopped = _why_stopped(seen)
    if stopped is not None and (first is None or first.signal in STOPS):
        complaint = _complained(seen) if first is None else None
        if complaint is not None and complaint.kind == "internal":
            return complaint  # it failed by itself while it was being stopped
        kind, why = stopped
        return seen.cause(kind, errors.EXIT_REQUEUE, f"{why}, before the ranks could save")
    if first is None:
        return None
    if first.signal in ("SIGTERM", "SIGUSR2"):
        message = f"{first.signal} ended rank {first.rank} before it could save"
        return seen.cause("preempted", errors.EXIT_REQUEUE, message, rank=first.rank, node=first.node)
    message = f"rank {first.rank} on {first.node} was killed by {first.signal}"
    return seen.cause("infrastructure", errors.EXIT_INFRASTRUCTURE, message, rank=first.rank, node=first.node)


def _complained(seen: _Evidence) -> Cause | None:
    """A rank failed by itself. Where all that failed only miss a peer, the one that left nothing is the cause."""
    failed = [end for end in (*seen.ends, *seen.words.ends) if end.failed and end.signal is None]
    if not failed and not seen.status:
        return None
    causes = [_from_status(seen)] if seen.status else []
    causes += [_from_end(seen, end) for end in failed]
    for cause in causes:
        if cause.node is not None and cause.log is None:
            return cause
        if not _NETWORK.search(cause.message):
            code, kind = _judge(cause.exit_code, cause.message)
            return seen.cause(kind, code, cause.message, rank=cause.rank, node=cause.node)
    silent = sorted(set(started_ranks(seen.attempt)) - {end.rank for end in seen.ends})
    if len(silent) == 1:
        message = f"rank {silent[0]} ended without a word; the others say: {causes[0].message}"
        return seen.cause("infrastructure", errors.EXIT_INFRASTRUCTURE, message, rank=silent[0])
    # That the others miss it is no proof against the node of the rank that happened to complain first.
    first = causes[0]
    return Cause(
        kind="infrastructure",
        exit_code=errors.EXIT_INFRASTRUCTURE,
        message=first.message,
        rank=first.rank,
        log=first.log,
        line=first.line,
    )


def _seconds(stamp: str) -> float:
    try:
        return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0
