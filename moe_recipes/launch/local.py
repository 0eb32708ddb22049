"""The ranks of a run as processes of this host: start them, pass signals on, end them together, name the cause."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from moe_recipes.config.errors import EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_REQUEUE
from moe_recipes.config.run_folder import TERMINAL_STATES, RunFolder
from moe_recipes.launch.words import ERROR_PREFIX, LINE_PREFIX, last_words, rank_log

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


class Ending(NamedTuple):
    """How the ranks of one start ended."""

    exit_code: int
    cause: str | None
    """Why, where the exit code is not 0."""


@dataclass
class _Ranks:
    """The processes, and the order in which they ended."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: queue.Queue[tuple[int, int]] = field(default_factory=queue.Queue)
    codes: dict[int, int] = field(default_factory=dict)
    """Return code by rank, in the order of the ends; minus the signal for a killed rank."""

    forwarded: list[int] = field(default_factory=list)
    ended_by_us: set[int] = field(default_factory=set)
    """Ranks that were still running when this process began to end them."""

    @property
    def running(self) -> list[int]:
        return [rank for rank in range(len(self.processes)) if rank not in self.codes]

    @property
    def first_failure(self) -> tuple[int, int] | None:
        return next(((r, c) for r, c in self.codes.items() if c != 0 and r not in self.ended_by_us), None)

    def signal(self, signum: int) -> None:
        for rank in self.running:
            self.processes[rank].send_signal(signum)

    def kill_groups(self) -> None:
        """End every process group, also those whose rank is gone: a rank may have left children."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def run_ranks(
    command: Sequence[str],
    *,
    num_ranks: int,
    folder: RunFolder,
    uses_status: bool = True,
    grace_s: float = 20.0,
    term_s: float = 5.0,
    terminal: IO[bytes] | None = None,
) -> Ending:
    """Run ``command`` once a rank on this host and wait for all of them.

    Rank 0 writes to the terminal and to its log, the others to their logs, all in a new ``attempts/<n>/``. SIGTERM,
    SIGINT (as SIGTERM) and SIGUSR2 are passed on to every rank once; a second SIGINT kills them. When a rank fails, the
    others get ``grace_s`` seconds to end, then SIGTERM, then ``term_s`` seconds later SIGKILL.

    Args:
        uses_status: the command reports in status.json; then its state and exit code decide, unless a rank failed
            before and for another reason.
        terminal: where rank 0's output goes beside its log; stdout if not given.
    Returns:
        The exit code for this process, and the cause, which was said on stderr. 69 if a rank was killed from outside,
        75 if a signal that was passed on ended a rank before it could save.
    """
    attempt = folder.new_attempt()
    if uses_status:
        folder.write_status("starting")
        folder.append_event("start", attempt=int(attempt.name), num_ranks=num_ranks, host=socket.gethostname())
    ranks = _Ranks()
    with _caught_signals() as caught:
        try:
            tee = _start(command, num_ranks, attempt, ranks, terminal or sys.stdout.buffer)
            _wait(ranks, caught, grace_s, term_s)
        finally:
            ranks.kill_groups()
        tee.join(timeout=5.0)
    ending = _verdict(ranks, folder, attempt, uses_status)
    if uses_status:
        folder.append_event("end", attempt=int(attempt.name), exit_code=ending.exit_code)
    return ending


def _start(
    command: Sequence[str], num_ranks: int, attempt: Path, ranks: _Ranks, terminal: IO[bytes]
) -> threading.Thread:
    shared = rank_environment(num_ranks, free_port())
    for rank in range(num_ranks):
        log = rank_log(attempt, rank).open("wb", buffering=0)
        ranks.processes.append(
            subprocess.Popen(
                list(command),
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else log,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        )
        if rank == 0:
            first_log = log
        else:
            log.close()
    for rank, process in enumerate(ranks.processes):
        threading.Thread(target=_report_end, args=(rank, process, ranks.ended), daemon=True).start()
    tee = threading.Thread(target=tee_output, args=(ranks.processes[0].stdout, first_log, terminal), daemon=True)
    tee.start()
    return tee


def rank_environment(num_ranks: int, port: int) -> Mapping[str, str]:
    """What every rank of one host is told, apart from its number."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    return {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Linux kills this process when the launcher dies, even by SIGKILL: no rank is left behind on a GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _report_end(rank: int, process: subprocess.Popen[bytes], ended: queue.Queue[tuple[int, int]]) -> None:
    ended.put((rank, process.wait()))


def tee_output(source: IO[bytes], log: IO[bytes], terminal: IO[bytes]) -> None:
    """Copy rank 0's output to the terminal and its log. A closed terminal or a full disk stops neither the other nor
    the reading: a rank whose output nobody takes would wait for ever."""
    with log:
        while chunk := source.read(65536):
            for output in (log, terminal):
                with suppress(OSError, ValueError):
                    output.write(chunk)
                    output.flush()


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Signals that arrive meanwhile, in order. Python delivers them to the main thread only."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {signum: signal.signal(signum, lambda number, _: caught.append(number)) for signum in FORWARDED}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(ranks: _Ranks, caught: list[int], grace_s: float, term_s: float) -> None:
    handled, term_at, kill_at = 0, None, None
    while ranks.running:
        for signum in caught[handled:]:
            handled += 1
            if signum not in ranks.forwarded:
                # A rank that has no handler yet meets SIGINT with a traceback; with one it treats both alike.
                passed_on = signal.SIGTERM if signum == signal.SIGINT else signum
                ranks.forwarded += [signum, passed_on]
                ranks.signal(passed_on)
            elif signum == signal.SIGINT:
                ranks.ended_by_us.update(ranks.running)
                ranks.kill_groups()
        try:
            rank, code = ranks.ended.get(timeout=0.1)
        except queue.Empty:
            pass
        else:
            ranks.codes[rank] = code
            if code != 0 and term_at is None:
                term_at = time.monotonic() + grace_s
        if term_at is not None and kill_at is None and time.monotonic() >= term_at:
            ranks.ended_by_us.update(ranks.running)
            ranks.signal(signal.SIGTERM)
            kill_at = time.monotonic() + term_s
        elif kill_at is not None and time.monotonic() >= kill_at:
            ranks.kill_groups()


def _verdict(ranks: _Ranks, folder: RunFolder, attempt: Path, uses_status: bool) -> Ending:
    status = (folder.read_status() or {}) if uses_status else {}
    finished = status.get("state") in TERMINAL_STATES and isinstance(status.get("exit_code"), int)
    failure = ranks.first_failure
    if failure is None and ranks.ended_by_us:
        failure = min(ranks.ended_by_us), -int(signal.SIGKILL)
    if finished and (failure is None or status["state"] == "done" or status["exit_code"] == failure[1]):
        if status["exit_code"] == EXIT_OK:
            return Ending(EXIT_OK, None)
        cause = f"{status.get('cause') or status['state']}"
        where = rank_log(attempt, status.get("rank") or 0)
        _say(f"{cause}; log: {where}", failed=status["state"] == "failed")
        return Ending(int(status["exit_code"]), cause)
    if failure is None:
        return Ending(EXIT_OK, None)
    rank, code = failure
    log = rank_log(attempt, rank)
    exit_code, cause = code, f"rank {rank} exited with code {code}"
    if code < 0:
        name = signal.Signals(-code).name
        exit_code, cause = EXIT_INFRASTRUCTURE, f"rank {rank} was killed by {name}"
        if -code in ranks.forwarded or rank in ranks.ended_by_us:
            exit_code, cause = EXIT_REQUEUE, f"{name} ended rank {rank} before it could save"
    elif said := last_words(log):
        cause = f"rank {rank}: {said}"
    if uses_status:
        folder.write_status(
            "stopped" if exit_code == EXIT_REQUEUE else "failed", cause=cause, rank=rank, exit_code=exit_code
        )
    _say(f"{cause}; log: {log}", failed=exit_code != EXIT_REQUEUE)
    return Ending(exit_code, cause)


def _say(line: str, *, failed: bool) -> None:
    print(f"{ERROR_PREFIX if failed else LINE_PREFIX}{line}", file=sys.stderr)
