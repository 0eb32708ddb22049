"""What a run folder says about its run: starts and ends, steps and their seconds, saves. Reads files, nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_recipes.config.resolve import recipe_to_dict
from moe_recipes.config.run_folder import TERMINAL_STATES, RunFolder
from moe_recipes.launch.slurm.causes import KIND_OF_CODE
from moe_recipes.launch.slurm.ledger import Ledger

RECENT_STEPS = 50
"""Steps over which the seconds of a step are averaged: as the trainer's own line does."""

_STEP = re.compile(rb'\{"step": (\d+),')
_STEP_S = re.compile(rb'"step_s": ([0-9.eE+-]+)')


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A line that is being written, or was cut by a kill, is left out."""
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    found = []
    for line in raw.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def seconds_of(stamp: Any) -> float | None:
    """Seconds since 1970 of a time as the run folder writes it; None for anything else."""
    try:
        return datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


@dataclass(frozen=True)
class Steps:
    """The steps that count: each stands once in metrics.jsonl, those that a resume trained anew were dropped there."""

    seconds: dict[int, float]
    """Seconds of each step."""

    last: dict[str, Any]
    """The whole record of the newest step; empty before the first."""

    @property
    def recent_s(self) -> float | None:
        """Mean seconds of the newest steps, or None before the first."""
        newest = [self.seconds[step] for step in sorted(self.seconds)[-RECENT_STEPS:]]
        return sum(newest) / len(newest) if newest else None

    def seconds_up_to(self, step: int) -> float:
        return sum(seconds for number, seconds in self.seconds.items() if number <= step)


def read_steps(path: Path) -> Steps:
    """Steps of metrics.jsonl. Only two numbers of a line are read: a line can hold 25,000 expert counts."""
    seconds: dict[int, float] = {}
    newest = b""
    try:
        with path.open("rb") as file:
            for line in file:
                step, step_s = _STEP.match(line), _STEP_S.search(line)
                if step and step_s and line.endswith(b"\n"):
                    seconds[int(step[1])], newest = float(step_s[1]), line
    except OSError:
        return Steps({}, {})
    return Steps(seconds, json.loads(newest) if newest else {})


@dataclass(frozen=True)
class End:
    """How one attempt ended."""

    attempt: int
    exit_code: int
    kind: str
    cause: str | None
    rank: int | None
    node: str | None
    log: str | None
    line: int | None
    time: str
    next: str | None
    """What the supervisor asked of Slurm then: requeue or hold; None for nothing, and outside of Slurm."""

    next_reason: str | None


class RunFacts:
    """The files of one run, each read once."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @cached_property
    def status(self) -> dict[str, Any]:
        return self.folder.read_status() or {}

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.folder.events)

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """What the supervisor wrote; empty for a run without Slurm."""
        return Ledger(self.folder).records()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self.folder.manifest.read_bytes())
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, as plain data.

        Raises:
            MissingInputError, CorruptCheckpointError: recipe.json is gone or damaged.
        """
        return recipe_to_dict(self.folder.read_recipe())

    @cached_property
    def steps(self) -> Steps:
        return read_steps(self.folder.metrics)

    @property
    def state(self) -> str:
        return str(self.status.get("state", "not started"))

    @property
    def is_over(self) -> bool:
        """The last attempt reported its end; a job may start another one."""
        return self.state in TERMINAL_STATES

    def _starts(self) -> list[dict[str, Any]]:
        starts = [r for r in (*self.events, *self.ledger) if r.get("event") == "start" and _trains(r)]
        return sorted(starts, key=lambda record: str(record.get("time")))

    @property
    def attempt(self) -> int | None:
        """Number of the newest attempt that trains."""
        return max(self.attempts, default=None)

    @property
    def attempts(self) -> list[int]:
        """Numbers of the attempts that trained, in order; an export makes a folder but is none."""
        return sorted({record["attempt"] for record in self._starts() if isinstance(record.get("attempt"), int)})

    @property
    def nodes(self) -> list[str]:
        """Nodes of the newest attempt."""
        for record in reversed(self._starts()):
            if record.get("nodes"):
                return [str(node) for node in record["nodes"]]
        host = self.status.get("host") or self.manifest.get("host")
        return [str(host)] if host else []

    @property
    def job(self) -> str | None:
        """The newest job of the run that trains; without one, the newest of any work."""
        jobs = [record for record in self.ledger if record.get("job") is not None]
        training = {record["job"] for record in jobs if record["event"] == "start" and _trains(record)}
        newest = [str(record["job"]) for record in jobs if record["job"] in training or not training]
        return newest[-1] if newest else None

    @property
    def first_start_s(self) -> float | None:
        """When the run was first started: seconds since 1970."""
        stamps = [*(record.get("time") for record in self._starts()[:1]), self.manifest.get("time")]
        return min(_numbers(map(seconds_of, stamps)), default=None)

    @property
    def durable_step(self) -> int:
        """The newest step of which a checkpoint is whole; 0 for none."""
        return int(self.status.get("last_durable_step") or 0)

    @property
    def saves(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == "checkpoint"]

    @property
    def ended_attempts(self) -> list[int]:
        """Numbers of the attempts that ended, in order."""
        return sorted({number for number in (record.get("attempt") for record in self._ends) if number is not None})

    @cached_property
    def _ends(self) -> list[dict[str, Any]]:
        return [record for record in self.ledger or self.events if record.get("event") == "end"]

    @property
    def last_end(self) -> End | None:
        """How the newest attempt that ended did so."""
        return self.end_of(self.ended_attempts[-1]) if self.ended_attempts else None

    def end_of(self, attempt: int) -> End | None:
        """How an attempt ended: by the ledger where there is one, else by the run's own files."""
        record = next((item for item in reversed(self._ends) if item.get("attempt") == attempt), None)
        if record is None:
            return None
        return self._ledger_end(record) if self.ledger else self._local_end(record)

    def _ledger_end(self, record: dict[str, Any]) -> End:
        later = self.ledger[self.ledger.index(record) + 1 :]
        actions = [item for item in later if item["event"] in ("requeue", "hold", "start")][:1]
        action = actions[0] if actions and actions[0]["event"] != "start" else {}
        return End(
            attempt=int(record["attempt"]),
            exit_code=int(record.get("exit_code") or 0),
            kind=str(record.get("kind")),
            cause=record.get("cause"),
            rank=record.get("rank"),
            node=record.get("node"),
            log=record.get("log"),
            line=record.get("line"),
            time=str(record.get("time")),
            next=action.get("event"),
            next_reason=action.get("reason"),
        )

    def _local_end(self, record: dict[str, Any]) -> End:
        """``status.json`` is about the newest attempt; of an older one only the exit code is left."""
        own = self.status if self.is_over and record["attempt"] == self.attempt else {}
        code = int(record.get("exit_code") or 0)
        return End(
            attempt=int(record["attempt"]),
            exit_code=code,
            kind=KIND_OF_CODE.get(code, "internal"),
            cause=own.get("cause"),
            rank=own.get("rank"),
            node=own.get("host") if code else None,
            log=None,
            line=None,
            time=str(record.get("time")),
            next=None,
            next_reason=None,
        )


def _trains(start: dict[str, Any]) -> bool:
    """The work of a start; events.jsonl knows only those that train."""
    return bool(start.get("work", "train") == "train")


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def now_s() -> float:
    return datetime.now(UTC).timestamp()
