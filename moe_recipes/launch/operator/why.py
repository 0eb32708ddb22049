"""The verb ``why``: the first cause of the end of an attempt, with rank, node, log and line; not what followed."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import EXIT_OK, EXIT_REQUEUE, MissingInputError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.operator.facts import End, RunFacts
from moe_recipes.launch.operator.find import Found, add_target, find_run
from moe_recipes.launch.operator.logs import spans
from moe_recipes.launch.slurm.causes import Cause, find_cause
from moe_recipes.launch.slurm.endings import read_rank_ends
from moe_recipes.launch.words import last_line, rank_log

PAGES = {
    "preempted": "the requeue loop",
    "time_limit": "the requeue loop",
    "node_failure": "a bad node",
    "infrastructure": "a bad node",
    "hang": "a hang",
    "out_of_memory": "out of memory",
    "cannot_write": "disk full",
    "corrupt": "roll back",
    "not_finite": "roll back",
    "environment": "upgrade the image",
}
"""Sections of docs/runbook.md."""

HELD_PAGE = PAGES["preempted"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--attempt", type=int, metavar="N", help="the attempt; the newest that ended if not given")


def run(options: argparse.Namespace) -> int:
    answer = explain(find_run(options.run, options.runs), options.attempt)
    print(json.dumps(answer, indent=2) if options.json else "\n".join(lines_of_cause(answer)))
    return EXIT_OK


def explain(found: Found, attempt: int | None = None) -> dict[str, Any]:
    """The first cause, as plain data. ``kind`` is None for a run of which no attempt has ended.

    Raises:
        MissingInputError: there is no such attempt, or it has not ended.
    """
    facts = RunFacts(found.folder)
    ended = facts.ended_attempts
    answer: dict[str, Any] = {"run": str(found.folder.path), "state": facts.state, "attempt": None, "kind": None}
    if attempt is not None and attempt not in ended:
        known = f"those that ended are {spans(ended)}" if ended else "none has ended"
        raise MissingInputError(f"{found.folder.path}: attempt {attempt} has not ended or never was; {known}")
    if attempt is None and not ended:
        return answer
    chosen = ended[-1] if attempt is None else attempt
    end = facts.end_of(chosen)
    folder = found.folder.attempts / str(chosen)
    cause = _recorded(end) if end and facts.ledger else _found(found.folder, folder, end)
    log = _place(found.folder, cause.log)
    return {
        **answer,
        "attempt": chosen,
        "kind": cause.kind,
        "exit_code": end.exit_code if end else cause.exit_code,
        "cause": cause.message,
        "rank": cause.rank,
        "node": cause.node,
        "log": str(log) if log else None,
        "line": cause.line,
        "text": _line_of(log, cause.line) if log and cause.line else None,
        "followed": _followers(folder, cause.rank),
        "next": end.next if end else None,
        "next_reason": end.next_reason if end else None,
        "page": HELD_PAGE if end and end.next == "hold" else PAGES.get(cause.kind),
    }


def _recorded(end: End) -> Cause:
    """What the supervisor found, when it had srun and Slurm before its eyes."""
    return Cause(
        kind=end.kind,  # type: ignore[arg-type]
        exit_code=end.exit_code,
        message=end.cause or end.kind,
        rank=end.rank,
        node=end.node,
        log=end.log,
        line=end.line,
    )


def _found(folder: RunFolder, attempt: Path, end: End | None) -> Cause:
    """A run without a supervisor. Of an attempt before the newest, status.json says nothing any more: its exit code
    and rank 0's last words are left."""
    cause = find_cause(folder, attempt, end.exit_code if end else None)
    if end is None or cause.exit_code == end.exit_code:
        return cause
    log = rank_log(attempt, 0)
    said = last_line(log)
    message = said.text if said else f"ended with exit code {end.exit_code}"
    place = (str(log), said.number) if said else (None, None)
    return Cause(
        kind=end.kind,  # type: ignore[arg-type]
        exit_code=end.exit_code,
        message=message,
        rank=0,
        log=place[0],
        line=place[1],
    )


def _place(folder: RunFolder, log: str | None) -> Path | None:
    """Where the log is now; a run folder may have been moved since the ledger named it."""
    if log is None:
        return None
    path = Path(log)
    if path.is_absolute() and not path.exists() and "attempts" in path.parts:
        path = Path(*path.parts[len(path.parts) - path.parts[::-1].index("attempts") - 1 :])
    return path if path.is_absolute() else folder.path / path


def _line_of(log: Path, number: int) -> str | None:
    try:
        with log.open("rb") as file:
            found = next(islice(file, number - 1, number), None)
    except OSError:
        return None
    return None if found is None else found.decode(errors="replace").rstrip("\n")


def _followers(attempt: Path, first: int | None) -> str | None:
    """The ranks that failed after the first one, as ``0-6,8``."""
    others = sorted(end.rank for end in read_rank_ends(attempt) if end.failed and end.rank != first)
    return spans(others) if others else None


def lines_of_cause(answer: dict[str, Any]) -> list[str]:
    """The answer for people."""
    if answer["kind"] is None:
        return [f"{answer['run']}: no attempt has ended (state: {answer['state']})"]
    rows: dict[str, str | None] = {
        "attempt": f"{answer['attempt']} of {answer['run']}: {answer['kind']}, exit {answer['exit_code']}",
        "cause": answer["cause"],
        "rank": None if answer["rank"] is None else str(answer["rank"]),
        "node": answer["node"],
        "log": f"{answer['log']}:{answer['line']}" if answer["line"] else answer["log"],
        "line": answer["text"],
        "followed": _followed(answer),
        "next": _next(answer),
        "see": f"docs/runbook.md, {answer['page']}" if answer["page"] else None,
    }
    return [f"{name:<9} {text}" for name, text in rows.items() if text is not None]


def _followed(answer: dict[str, Any]) -> str | None:
    ranks = answer["followed"]
    if ranks is None or answer["exit_code"] in (EXIT_OK, EXIT_REQUEUE):
        return None
    return f"{'rank' if ranks.isdigit() else 'ranks'} {ranks} failed after it"


def _next(answer: dict[str, Any]) -> str | None:
    said = {"requeue": "requeued", "hold": "held, until `scontrol release`"}.get(str(answer["next"]))
    return f"{said}: {answer['next_reason']}" if said and answer["next_reason"] else said
