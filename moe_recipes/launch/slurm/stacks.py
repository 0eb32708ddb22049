"""Stacks that hung ranks printed into their logs, and the rank that does something else than the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moe_recipes.launch.slurm.endings import started_ranks
from moe_recipes.launch.words import rank_log

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
Stack = tuple[str, ...]
"""``file:function`` of the frames of the main thread, the innermost first."""

WAITS_FOR_PEERS = re.compile(r"torch/distributed/|/gloo/|/nccl/")


def log_sizes(attempt: Path) -> dict[int, int]:
    """Bytes of each rank's log: what is written after a signal starts there."""
    found: dict[int, int] = {}
    for rank in started_ranks(attempt):
        with suppress(OSError):  # a file system that hangs is a cause of hangs
            found[rank] = rank_log(attempt, rank).stat().st_size
    return found


def new_stacks(attempt: Path, before: Mapping[int, int]) -> dict[int, Stack | None]:
    """The stack that each rank printed since ``before``; None for a rank that printed none."""
    found: dict[int, Stack | None] = {}
    for rank in started_ranks(attempt):
        found[rank] = None
        with suppress(OSError), rank_log(attempt, rank).open("rb") as file:
            file.seek(before.get(rank, 0))
            found[rank] = _main_stack(file.read().decode(errors="replace"))
    return found


def _main_stack(text: str) -> Stack | None:
    """Python's handler marks the thread that got the signal, which is the main one, as the current one."""
    _, marked, rest = text.rpartition("Current thread 0x")
    if not marked:
        return None
    frames: list[str] = []
    for line in rest.splitlines()[1:]:
        if (match := _FRAME.match(line)) is None:
            break
        frames.append(f"{match['file']}:{match['function']}")
    return tuple(frames)


def odd_rank(stacks: Mapping[int, Stack | None]) -> tuple[int, str] | None:
    """The one rank that holds up all others, and what it does; None where no single one stands out.

    It is the only one without an answer, else the only one that does not wait for its peers, else the only one whose
    stack differs while the others' agree.
    """
    silent = [rank for rank, stack in stacks.items() if stack is None]
    if silent:
        alone = len(silent) == 1 and len(stacks) > 1
        return (silent[0], "does not answer: stopped, or stuck in the driver") if alone else None
    busy = [rank for rank, stack in stacks.items() if not any(WAITS_FOR_PEERS.search(f) for f in stack or ())]
    if len(busy) == 1 and len(stacks) > 1:
        return busy[0], f"is in {_place(stacks[busy[0]])} while the others wait for it"
    counts = Counter(stacks.values())
    rare = [rank for rank, stack in stacks.items() if counts[stack] == 1]
    if len(rare) == 1 and len(counts) == 2 and len(stacks) > 2:
        return rare[0], f"is in {_place(stacks[rare[0]])}, the others are elsewhere"
    return None


def _place(stack: Stack | None) -> str:
    return (stack or ("an unknown place",))[0]
