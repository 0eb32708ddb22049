"""What a rank left in its log: where the logs are, and the one line that says why it ended."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

LINE_PREFIX = "moe-recipes: "
ERROR_PREFIX = f"{LINE_PREFIX}error: "


class LogLine(NamedTuple):
    """A line of a log, without our prefixes."""

    number: int
    """From 1."""

    text: str


def rank_log(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank:05d}.log"


def last_line(log: Path, tail_bytes: int = 65536) -> LogLine | None:
    """The last error line of a rank's log, else its last line with text; None for an empty log."""
    try:
        with log.open("rb") as file:
            start = max(0, log.stat().st_size - tail_bytes)
            before = _count_lines(file, start)
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return None
    said = [LogLine(number, line.strip()) for number, line in enumerate(lines, before + 1) if line.strip()]
    ours = [line for line in said if line.text.startswith(LINE_PREFIX)]
    if not (ours or said):
        return None
    number, text = (ours or said)[-1]
    return LogLine(number, text.removeprefix(ERROR_PREFIX).removeprefix(LINE_PREFIX))


def _count_lines(file: IO[bytes], num_bytes: int) -> int:
    found = 0
    while num_bytes > 0 and (chunk := file.read(min(num_bytes, 1 << 20))):
        found += chunk.count(b"\n")
        num_bytes -= len(chunk)
    return found


def last_words(log: Path, tail_bytes: int = 65536) -> str | None:
    """The text of ``last_line``."""
    line = last_line(log, tail_bytes)
    return line.text if line is not None else None


NOT_THERE = re.compile(r"No such file|not found|does not exist|cannot find", re.IGNORECASE)
_CONTAINER = re.compile(r"\[ERROR\]|\[FATAL\]|FATAL:")


def most_telling_first(lines: Iterable[str]) -> list[str]:
    """What is not there, then what the container's runtime says, then the rest, each in the order given.

    Which of srun's lines comes first is chance: nodes write as they fail.
    """
    return sorted(lines, key=lambda line: (not NOT_THERE.search(line), not _CONTAINER.search(line)))
