"""The supervisor's eyes on one srun: signals, the time limit, progress. It ends when srun does."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_recipes.config.cluster import Limits
from moe_recipes.config.errors import MoeRecipesError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.local import tee_output
from moe_recipes.launch.slurm.commands import JobFacts, job_facts, signal_job, slurm_command
from moe_recipes.launch.slurm.endings import SRUN_LOG
from moe_recipes.launch.slurm.stacks import Stack, log_sizes, new_stacks, odd_rank
from moe_recipes.launch.slurm.timing import Times, hang_limit_s, is_starting, last_event, measured_times
from moe_recipes.launch.words import rank_log

TICK_S = 0.5
PROGRESS_S = 5.0
"""How often the run's files are looked at."""

FACTS_S = 20.0
"""How often the scheduler is asked for the job's end: an operator may have moved it."""

MEASURE_S = 30.0
"""How often the run's times are measured anew."""

DUMP_S = 20.0
"""How long ranks have to print their stacks."""

BACKSTOP_S = 200.0
"""Slurm's own warning, ``--signal=B:USR2@120``, comes at most a minute early."""

END_S = 90.0
"""How long srun has to end a step that hangs, before it is killed itself; longer than Slurm's KillWait."""


DEFAULT_KILL_WAIT_S = 30.0


@dataclass
class Signals:
    """What the supervisor got, in order. Handlers only note it: the loop acts."""

    caught: list[signal.Signals] = field(default_factory=list)

    def listen(self) -> None:
        """From now on SIGTERM, SIGINT and SIGUSR2 are noted, and end nothing. SIGUSR1 and SIGHUP do nothing: ``scancel
        --full --signal=USR1`` asks the ranks for their stacks, and this process gets it too."""
        for ignored in (signal.SIGUSR1, signal.SIGHUP):
            signal.signal(ignored, lambda *_: None)  # not SIG_IGN, which srun would inherit
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, lambda caught, _: self.caught.append(signal.Signals(caught)))

    @property
    def is_ending(self) -> bool:
        """Slurm ends this job: it is cancelled, preempted, requeued, out of time, or lost a node."""
        return signal.SIGTERM in self.caught or signal.SIGINT in self.caught


@dataclass
class Watch:
    """One attempt under way.

    Attributes:
        note: called with ``(what, reason)`` for the ledger and the operator.
        asked: why the ranks were told to stop, if they were: ``time_limit``, ``signal``, ``hang``.
        odd: rank that held up the others in a hang, and what it did.
    """

    process: subprocess.Popen[bytes]
    folder: RunFolder
    attempt: Path
    job: JobFacts
    limits: Limits
    estimate: Times
    signals: Signals
    note: Callable[[str, str], Any]
    may_hang: bool
    asked: str | None = None
    odd: tuple[int, str] | None = None
    _kill_s: float | None = None

    def run(self) -> int | None:
        """Wait for srun and act meanwhile; its exit code. None where Slurm is about to kill what is left of the job,
        this process too: the verdict must be written before."""
        self._measure()
        self._marks, self._still_s = self._progress(), 0.0
        self._looked = self._asked_slurm = time.monotonic()
        handled = 0
        while self._wait(TICK_S) is None:
            for number in self.signals.caught[handled:]:
                handled += 1
                self._stop_ranks(self._whose(number), f"the supervisor got {number.name}")
            now = time.monotonic()
            if now - self._asked_slurm >= (TICK_S if self.signals.is_ending else FACTS_S):
                self._asked_slurm = now
                self._ask_slurm()
            if self.signals.is_ending and self._is_last_moment(now):
                return None
            if now - self._measured >= MEASURE_S:
                self._measure()
            self._mind_the_limit()
            if self.may_hang and now - self._looked >= PROGRESS_S:
                self._mind_progress(now)
        code = self.process.wait()
        return code if code >= 0 else 128 - code

    def _wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def _stop_ranks(self, asked: str, reason: str) -> None:
        """Once: srun passes SIGUSR2 on to every task, without the scheduler's help."""
        if self.asked is not None:
            return
        self.asked = asked
        self.process.send_signal(signal.SIGUSR2)
        self.note("SIGUSR2", reason)

    def _whose(self, number: signal.Signals) -> str:
        """Slurm's own warning (``#SBATCH --signal``) comes near the time limit; any other signal is somebody's."""
        end_s = self.job.end_time
        is_near = end_s is not None and end_s - time.time() <= BACKSTOP_S and not is_shortened(self.job)
        return "time_limit" if number == signal.SIGUSR2 and is_near else "signal"

    def _ask_slurm(self) -> None:
        """Learn a new end of the job; while the scheduler is away the old one holds."""
        with suppress(MoeRecipesError):
            self.job = job_facts(self.job.job_id)

    def _is_last_moment(self, now: float) -> bool:
        """Half of Slurm's KillWait is over. A preemption's grace time comes before it: the job is RUNNING then."""
        if self.job.state == "RUNNING":
            return False
        if self._kill_s is None:
            self._kill_s = now + kill_wait_s() / 2
        return now >= self._kill_s

    def _mind_the_limit(self) -> None:
        if self.job.end_time is None or self.asked is not None:
            return
        left_s = self.job.end_time - time.time()
        if left_s > self._times.signal_lead_s or left_s > self._lead_s():
            return
        self._measure()  # the run may have become quicker than its first steps, or than the estimate
        lead_s = self._lead_s()
        if left_s <= lead_s:
            whose = "preemption" if is_shortened(self.job) else "time limit"
            asked = "signal" if whose == "preemption" else "time_limit"
            lead = f"{lead_s:.0f} s are needed for a step and a save"
            self._stop_ranks(asked, f"{left_s:.0f} s to the {whose}; {lead}")

    def _lead_s(self) -> float:
        """How long before the end the ranks are told. Ranks that still start have nothing to save, and end at once if
        told, start after start: they are told when no more than a step and a save fits."""
        starting = is_starting(last_event(self.folder))
        return self._times.step_s + self._times.save_s if starting else self._times.signal_lead_s

    def _measure(self) -> None:
        self._measured = time.monotonic()
        self._times = measured_times(self.folder, self.estimate)

    def _progress(self) -> list[tuple[int, int]]:
        """What changes with every step, save and event; before the first step also what rank 0 says."""
        marks, paths = [], [self.folder.status, self.folder.events, self.folder.metrics]
        if is_starting(last_event(self.folder)):
            paths.append(rank_log(self.attempt, 0))
        for path in paths:
            try:
                found = path.stat()
            except OSError:
                continue
            marks.append((found.st_mtime_ns, found.st_size))
        return marks

    def _mind_progress(self, now: float) -> None:
        # A look counts for little time: a suspended job stands still with this process, and hangs not.
        since_s, self._looked = min(now - self._looked, 2 * PROGRESS_S), now
        marks = self._progress()
        if marks != self._marks:
            self._marks, self._still_s = marks, 0.0
            return
        self._still_s += since_s
        event = last_event(self.folder)
        limit_s = hang_limit_s(self.limits, self._times, event)
        if self._still_s > limit_s:
            after = f" after {event!r}" if event else ""
            self._end_hang(f"no progress for {self._still_s:.0f} s{after}; the limit is {limit_s:.0f} s")

    def _end_hang(self, reason: str) -> None:
        self.asked = "hang"
        self.note("SIGUSR1", reason)
        before = log_sizes(self.attempt)
        self.process.send_signal(signal.SIGUSR1)
        deadline, stacks = time.monotonic() + DUMP_S, dict[int, Stack | None]()
        while time.monotonic() < deadline and self._wait(1.0) is None:
            stacks = new_stacks(self.attempt, before)
            if stacks and all(stack is not None for stack in stacks.values()):
                break
        self.odd = odd_rank(stacks)
        self.note("SIGKILL", "the step hangs" if self.odd is None else f"rank {self.odd[0]} {self.odd[1]}")
        self.end_step()

    def end_step(self) -> None:
        """End all ranks, and srun with them."""
        self.process.send_signal(signal.SIGTERM)
        try:
            for step in steps_of_job(self.job.job_id):
                signal_job(step, "KILL")
        except MoeRecipesError as error:
            self.note("SIGTERM", f"to srun alone: {error}")
        if self._wait(END_S) is None:
            self.process.kill()


def is_shortened(job: JobFacts) -> bool:
    """The job ends well before its time limit: a preemption's grace time runs."""
    if job.end_time is None or job.start_time is None or job.time_limit_s is None:
        return False
    return job.end_time < job.start_time + job.time_limit_s - 90


def kill_wait_s() -> float:
    """Seconds between the SIGTERM and the SIGKILL with which Slurm ends a job; its default where it does not say."""
    try:
        text = slurm_command(["scontrol", "show", "config"], timeout_s=5.0)
    except MoeRecipesError:
        return DEFAULT_KILL_WAIT_S
    match = re.search(r"^KillWait\s*=\s*(\d+)", text, re.MULTILINE)
    return float(match[1]) if match else DEFAULT_KILL_WAIT_S


def steps_of_job(job_id: str) -> list[str]:
    """The running steps of a job that srun started, as ``JOB.STEP``.

    Raises:
        InfrastructureError: the scheduler does not answer.
    """
    said = slurm_command(["squeue", "-h", "-s", "-j", job_id, "-o", "%i"])
    return [step for step in said.split() if step.rpartition(".")[2].isdigit()]


def start_srun(
    command: list[str], environ: dict[str, str], attempt: Path
) -> tuple[subprocess.Popen[bytes], threading.Thread]:
    """Start srun. Its stdout is this process's; its stderr goes there too, and to ``srun.log`` of the attempt.

    Returns:
        The process, and the thread that copies its stderr.
    Raises:
        OSError: this host has no srun, or the log cannot be written.
    """
    log = (attempt / SRUN_LOG).open("wb", buffering=0)
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0)
    copy = threading.Thread(target=tee_output, args=(process.stderr, log, sys.stderr.buffer), daemon=True)
    copy.start()
    return process, copy
