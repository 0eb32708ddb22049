"""What an attempt left behind: how each rank ended, and what srun said. Facts only; ``causes.py`` judges them."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from moe_recipes.launch.words import rank_log

SRUN_LOG = "srun.log"
LATE_FILES_S = 40.0
"""A network file system may show another host's new files this late."""

CASCADE_S = 5.0
"""A rank that was killed may be seen this much later than the complaints of its peers: clocks of nodes differ."""

_TASKS = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
_MISSING_PACKAGE = re.compile(r"(ModuleNotFoundError|ImportError): |\S+: No module named ")
_CASCADE = re.compile(r"Terminating StepId|Job step aborted|Force Terminated|CANCELLED AT")
_HOW = {
    "Killed": "SIGKILL",
    "Terminated": "SIGTERM",
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "User defined signal 2": "SIGUSR2",
    "User defined signal 1": "SIGUSR1",
}


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended: by an exit code or a signal."""

    rank: int
    node: str
    exit_code: int | None
    signal: str | None
    """Name with SIG."""

    time: str
    """ISO 8601; empty where only srun spoke of it."""

    cause: str | None = None
    """What its task said, where the rank itself could not be started."""

    @property
    def failed(self) -> bool:
        return self.exit_code != 0


@dataclass(frozen=True, kw_only=True)
class SrunWords:
    """What srun and Slurm said on stderr."""

    ends: tuple[RankEnd, ...] = ()
    """Tasks that srun saw end badly before it began to end the others."""

    failed_node: str | None = None
    out_of_memory: bool = False
    why_cancelled: str | None = None
    """``TIME LIMIT``, ``PREEMPTION``, ``NODE FAILURE``, ``JOB REQUEUE``; empty for a plain cancel."""

    missing_package: str | None = None
    """The last line of a task's traceback, where its Python lacks a package: such a task leaves no log."""

    errors: tuple[str, ...] = ()
    """Error lines, without those about tasks."""


def read_rank_ends(attempt: Path) -> list[RankEnd]:
    """Every ``rank-NNNNN.exit.json`` of an attempt, the earliest first."""
    found = []
    for path in attempt.glob("rank-*.exit.json"):
        try:
            plain = json.loads(path.read_bytes())
            code, signum = plain.get("exit_code"), plain.get("signal")
            found.append(
                RankEnd(
                    rank=int(plain["rank"]),
                    node=str(plain["host"]),
                    exit_code=int(code) if code is not None else None,
                    signal=_signal_name(signum),
                    time=str(plain["time"]),
                    cause=plain.get("cause"),
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # cut short by a kill: srun's words are left
    return sorted(found, key=lambda end: (end.time, end.rank))


def _signal_name(value: object) -> str | None:
    if isinstance(value, int):
        return signal.Signals(value).name
    return str(value) if value else None


def read_srun_words(attempt: Path) -> SrunWords:
    """What srun said in this attempt; nothing where it never ran."""
    try:
        lines = (attempt / SRUN_LOG).read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return SrunWords()
    ends: list[RankEnd] = []
    cascade, failed_node, out_of_memory, why, errors = False, None, False, None, []
    for line in (line.strip() for line in lines):
        if match := _TASKS.match(line):
            ends += [] if cascade else _task_ends(match)
        elif node := re.search(r"[Nn]ode failure on (\S+)", line):
            failed_node = failed_node or node[1].strip(",.")
        elif re.search(r"error: ", line):
            if match := re.search(r"\*\*\* (?:STEP|JOB) .* CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?", line):
                why = why or (match[1] or "").strip()
            else:
                errors.append(re.sub(r"^.*?error: ", "", line))
        out_of_memory = out_of_memory or bool(re.search(r"oom[-_ ]kill|out-of-memory handler", line, re.IGNORECASE))
        cascade = cascade or bool(_CASCADE.search(line))
    return SrunWords(
        ends=tuple(ends),
        failed_node=failed_node,
        out_of_memory=out_of_memory,
        why_cancelled=why,
        missing_package=next((line for line in lines if _MISSING_PACKAGE.match(line)), None),
        errors=tuple(dict.fromkeys(errors)),
    )


def missing_endings(attempt: Path, srun_code: int | None) -> bool:
    """srun says that tasks ended by themselves, which leave a file each, but not all of those are to be seen here."""
    ended = {end.rank for end in read_srun_words(attempt).ends if end.exit_code is not None}
    seen = {end.rank for end in read_rank_ends(attempt)}
    return not ended <= seen or (srun_code == 0 and not seen)


def _task_ends(match: re.Match[str]) -> list[RankEnd]:
    how = match["how"].removesuffix(" (core dumped)")
    code = re.fullmatch(r"Exited with exit code (\d+)", how)
    if code is None and how not in _HOW:
        return []
    number = int(code[1]) if code else None
    killed_by = _HOW.get(how)
    if number is not None and number - 128 in _SIGNALS:  # the task says so of its rank, as a shell does
        killed_by, number = signal.Signals(number - 128).name, None
    return [
        RankEnd(rank=rank, node=match["node"], exit_code=number, signal=killed_by, time="")
        for rank in _numbers(match["tasks"])
    ]


_SIGNALS = {int(signum) for signum in signal.Signals}


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def started_ranks(attempt: Path) -> list[int]:
    """Ranks that left a log: their task came up, in the container."""
    return sorted(int(path.name[5:10]) for path in attempt.glob("rank-[0-9][0-9][0-9][0-9][0-9].log"))


def log_of(attempt: Path, rank: int) -> Path | None:
    """The log of a rank, or None if it has none."""
    path = rank_log(attempt, rank)
    return path if path.exists() else None
