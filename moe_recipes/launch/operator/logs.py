"""The verb ``logs``: print or follow what a rank wrote."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_recipes.config.errors import (
    EXIT_INFRASTRUCTURE,
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_REQUEUE,
    MissingInputError,
    RecipeError,
)
from moe_recipes.config.run_folder import TERMINAL_STATES, RunFolder
from moe_recipes.launch.operator.find import add_target, find_run
from moe_recipes.launch.words import rank_log

POLL_S = 0.5
RESTARTED = (EXIT_REQUEUE, EXIT_INFRASTRUCTURE, EXIT_INTERNAL)
"""Exit codes after which another attempt may come by itself."""


class Log(NamedTuple):
    """The log of one rank in one attempt."""

    path: Path
    attempt: int
    rank: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="the rank; 0 if not given")
    parser.add_argument("--attempt", type=int, metavar="N", help="the attempt; the newest if not given")
    parser.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends or Ctrl-C")


def run(options: argparse.Namespace) -> int:
    if options.lines is not None and options.lines < 1:
        raise RecipeError(f"--lines {options.lines} must be at least 1")
    folder = find_run(options.run, options.runs).folder
    log = find_log(folder, rank=options.rank, attempt=options.attempt)
    lines, rest, offset = read_whole_lines(log.path)
    if rest and not options.follow:
        lines.append(rest.decode(errors="replace"))
    lines = lines[-options.lines :] if options.lines else lines
    if not lines and not options.follow and not options.json:
        print(f"{log.path} is empty so far", file=sys.stderr)
    if options.json and not options.follow:
        answer = {"log": str(log.path), "attempt": log.attempt, "rank": log.rank, "lines": lines}
        print(json.dumps(answer, indent=2))
        return EXIT_OK
    _show(lines, log, as_json=options.json)
    if options.follow:
        for source, new in follow(folder, log, offset, rest, stay=options.attempt is not None):
            _show(new, source, as_json=options.json)
    return EXIT_OK


def _show(lines: list[str], log: Log, *, as_json: bool) -> None:
    for line in lines:
        print(json.dumps({"attempt": log.attempt, "rank": log.rank, "line": line}) if as_json else line, flush=True)


def find_log(folder: RunFolder, *, rank: int, attempt: int | None) -> Log:
    """The log of a rank; of the newest attempt that has logs if none is given.

    Raises:
        MissingInputError: no such attempt or rank; says which there are.
    """
    there = attempts_with_logs(folder)
    if not there:
        raise MissingInputError(f"{folder.path}: no attempt has written a log yet")
    chosen = max(there) if attempt is None else attempt
    if chosen not in there:
        raise MissingInputError(f"{folder.path}: no logs of attempt {chosen}; there are {spans(sorted(there))}")
    if rank not in there[chosen]:
        known = spans(there[chosen])
        raise MissingInputError(f"{folder.path}: attempt {chosen} has no log of rank {rank}; there are {known}")
    return Log(rank_log(folder.attempts / str(chosen), rank), chosen, rank)


def attempts_with_logs(folder: RunFolder) -> dict[int, list[int]]:
    """Ranks that have a log, by attempt."""
    found: dict[int, list[int]] = {}
    for path in folder.attempts.glob("[0-9]*/rank-*.log"):
        rank = path.stem.removeprefix("rank-")
        if path.parent.name.isdigit() and rank.isdigit():
            found.setdefault(int(path.parent.name), []).append(int(rank))
    return {attempt: sorted(ranks) for attempt, ranks in found.items()}


def spans(numbers: list[int]) -> str:
    """``0-15,17`` for sorted numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def read_whole_lines(path: Path) -> tuple[list[str], bytes, int]:
    """The lines, the bytes of a last line that has no end yet, and the bytes read."""
    data = path.read_bytes()
    *whole, rest = data.split(b"\n")
    return [line.decode(errors="replace") for line in whole], rest, len(data)


def follow(folder: RunFolder, log: Log, offset: int, rest: bytes, *, stay: bool) -> Iterator[tuple[Log, list[str]]]:
    """New lines after ``offset`` as they come, from the next attempts too unless ``stay``. ``rest`` is the begun line
    before ``offset``. Ends when the run has ended and no attempt will follow by itself."""
    while True:
        over = _is_over(folder)  # asked before reading: what was written before the end is then read
        with log.path.open("rb") as file:
            file.seek(offset)
            data = file.read()
        offset += len(data)
        *whole, rest = (rest + data).split(b"\n")
        if whole:
            yield log, [line.decode(errors="replace") for line in whole]
        if data:
            continue
        there = attempts_with_logs(folder)
        newest = max(there)
        goes_on = newest > log.attempt and log.rank in there[newest] and not stay
        if goes_on or over or newest > log.attempt:
            if rest:
                yield log, [rest.decode(errors="replace")]
            if not goes_on:
                return
            log, offset, rest = find_log(folder, rank=log.rank, attempt=newest), 0, b""
        else:
            time.sleep(POLL_S)


def _is_over(folder: RunFolder) -> bool:
    status = folder.read_status() or {}
    return status.get("state") in TERMINAL_STATES and status.get("exit_code") not in RESTARTED
