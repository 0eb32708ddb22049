"""The ledger of a run: what happened to its jobs, and why. Written on the host, outside the container.

One JSON object a line in ``RUN/slurm/ledger.jsonl``, only ever appended:

start    an attempt begins: first_step, the newest durable step before it
end      it is over: exit_code, kind, cause, rank, node, log, line, first_step, durable_step; late=true where the
         supervisor died with its node and the next start filed it
requeue, hold    what the supervisor asked Slurm for, with the reason
signal   what the supervisor sent to the ranks, with the reason
note     anything else that an operator wants to know
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.config.run_folder import RunFolder, append_line, now

Event = Literal["start", "end", "requeue", "hold", "signal", "note"]
Record = dict[str, Any]


class Ledger:
    """The ledger of one run folder. One supervisor at a time appends; anybody reads."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @property
    def path(self) -> Path:
        return self.folder.slurm / "ledger.jsonl"

    def append(
        self, event: Event, *, job: str, restart: int, attempt: int | None, nodes: Sequence[str], **fields: Any
    ) -> Record:
        """Add one record with time and host, and wait until the disk has it.

        Raises:
            CannotWriteError: the file cannot be written.
        """
        record = {
            "time": now(),
            "event": event,
            "job": job,
            "restart": restart,
            "attempt": attempt,
            "nodes": list(nodes),
            "host": socket.gethostname(),
            **fields,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWriteError(
                f"{self.path}: cannot be written: {error.strerror or error}; free space there"
            ) from error
        append_line(self.path, record, durable=True)
        return record

    def records(self) -> list[Record]:
        """Every whole record, oldest first; none for a run that no job has started."""
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "event" in record:
                found.append(record)
        return found

    def unfinished(self) -> list[Record]:
        """Starts without an end: their supervisor died before it could say why."""
        records = self.records()
        ended = {_start_of(record) for record in records if record["event"] == "end"}
        return [record for record in records if record["event"] == "start" and _start_of(record) not in ended]


def _start_of(record: Record) -> tuple[Any, Any, Any]:
    return record.get("job"), record.get("restart"), record.get("attempt")


def durable_step(folder: RunFolder) -> int:
    """The newest step of which a checkpoint was reported whole; 0 for none."""
    step = (folder.read_status() or {}).get("last_durable_step")
    return step if isinstance(step, int) else 0
