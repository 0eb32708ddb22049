"""Nodes that a failure named: left out of later jobs until their entry expires.

One JSON file for all runs of a site, beside the run folders unless the cluster file says otherwise. An operator may
edit it: remove an entry and the node is used again.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import CannotWriteError, CorruptCheckpointError
from moe_recipes.config.run_folder import write_json
from moe_recipes.launch.slurm.lock import one_writer


@dataclass(frozen=True, kw_only=True)
class ExcludedNode:
    """One bad node. Times are UTC, ISO 8601."""

    node: str
    reason: str
    job: str
    time: str
    expires: str


def read(path: str | Path, *, at: float | None = None) -> list[ExcludedNode]:
    """The entries that have not expired, by node; empty where there is no file.

    Args:
        at: seconds since 1970 at which an entry must still hold; now, if not given.
    Raises:
        CorruptCheckpointError: the file holds something else.
        CannotWriteError: the file is there and cannot be read.
    """
    moment = _stamp(time.time() if at is None else at)
    return [entry for entry in _read_all(Path(path)) if entry.expires > moment]


def add(path: str | Path, node: str, *, reason: str, job: str, hours: float, at: float | None = None) -> ExcludedNode:
    """Add a node, or renew its entry; expired entries go. Several supervisors may call this at once.

    Args:
        hours: how long the node is left out.
        at: when it failed, in seconds since 1970; now, if not given.
    Raises:
        CannotWriteError: the file cannot be written.
        CorruptCheckpointError: it holds something else.
    """
    path, moment = Path(path), time.time() if at is None else at
    entry = ExcludedNode(
        node=node, reason=reason, job=job, time=_stamp(moment), expires=_stamp(moment + hours * 3600.0)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_writer(path):
            kept = [other for other in read(path, at=moment) if other.node != node]
            entries = sorted([*kept, entry], key=lambda one: one.node)
            write_json(path, {"nodes": [asdict(one) for one in entries]})
    except OSError as error:
        raise CannotWriteError(f"{path}: cannot be written: {error.strerror}; free space there") from error
    return entry


def _read_all(path: Path) -> list[ExcludedNode]:
    mend = "restore the file, or remove it to use all nodes again"
    try:
        plain: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CannotWriteError(f"{path}: cannot be read: {error.strerror}; mend its permissions") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: not valid JSON: {error}; {mend}") from error
    try:
        entries = [ExcludedNode(**entry) for entry in plain["nodes"]]
        if not all(isinstance(value, str) for entry in entries for value in asdict(entry).values()):
            raise TypeError("a value is no text")
        return entries
    except (TypeError, KeyError) as error:
        raise CorruptCheckpointError(f"{path}: no list of excluded nodes ({error}); {mend}") from error


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
