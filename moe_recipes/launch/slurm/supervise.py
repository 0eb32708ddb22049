"""One start of a job, from the batch host: it starts the ranks, watches them, names the cause of their end, and decides
what follows. Outside the container, where Slurm's commands are. docs/exit-codes.md says what follows from what.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import (
    EXIT_INTERNAL,
    EXIT_NOT_FINITE,
    EXIT_OK,
    EXIT_REQUEUE,
    CannotWriteError,
    MissingInputError,
    MoeRecipesError,
)
from moe_recipes.config.run_folder import TERMINAL_STATES, RunFolder, State, write_json
from moe_recipes.launch.preflight.cause import preflight_cause
from moe_recipes.launch.shakedown import start_afresh, write_verdict
from moe_recipes.launch.slurm import commands
from moe_recipes.launch.slurm.after import carry_out, exclude_later_jobs, slurm_state, wait_for_endings
from moe_recipes.launch.slurm.causes import KIND_OF_CODE, Cause, find_cause
from moe_recipes.launch.slurm.job_index import note_job
from moe_recipes.launch.slurm.late import cause_fields, file_unfinished
from moe_recipes.launch.slurm.ledger import Ledger, Record, durable_step
from moe_recipes.launch.slurm.lock import run_lock
from moe_recipes.launch.slurm.policy import Decision, decide
from moe_recipes.launch.slurm.spec import JobSpec, read_spec
from moe_recipes.launch.slurm.srun import srun_command, srun_environment
from moe_recipes.launch.slurm.timing import Times, check_walltime, estimated_times, measured_times
from moe_recipes.launch.slurm.watch import Signals, Watch, start_srun
from moe_recipes.launch.words import ERROR_PREFIX, LINE_PREFIX

ASKS_ONCE = ("preflight", "probe", "bench")
"""Works whose answer is what somebody waits for: a bad one is not tried again."""


def supervise(spec_path: str) -> int:
    """Run one start of the job on its batch host, and say what follows.

    Args:
        spec_path: ``RUN/slurm/<job>/spec.json``.
    Returns:
        The exit code for the batch script: one of the contract. Where the job is requeued or held, Slurm ends this
        process soon after.
    """
    signals = Signals()
    signals.listen()
    try:
        spec = read_spec(spec_path)
        job_id = os.environ["SLURM_JOB_ID"]
        # Not SLURM_RESTART_COUNT: a first start has none of its own, and sbatch hands on that of the submitting shell.
        restart = commands.job_facts(job_id, patience_s=commands.PATIENCE_S).restart_count
        return Start(spec, signals, job_id, restart).run()
    except MoeRecipesError as error:
        say(str(error), failed=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_INTERNAL


def say(line: str, *, failed: bool = False) -> None:
    """One line for the operator, in the job's own output."""
    with suppress(OSError):  # a full disk under the job's output must not end the job
        print(f"{ERROR_PREFIX if failed else LINE_PREFIX}{line}", file=sys.stderr if failed else sys.stdout, flush=True)


@dataclass
class Start:
    """One start of a job."""

    spec: JobSpec
    signals: Signals
    job_id: str
    restart: int
    attempt: Path | None = None
    nodes: Sequence[str] = ()
    first_step: int = 0
    folder: RunFolder = field(init=False)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.spec.folder
        self.ledger = Ledger(self.folder)

    @property
    def uses_status(self) -> bool:
        return self.spec.work == "train"

    def write(self, event: Any, **fields: Any) -> Record:
        number = int(self.attempt.name) if self.attempt is not None else None
        return self.ledger.append(
            event, job=self.job_id, restart=self.restart, attempt=number, nodes=self.nodes, **fields
        )

    def run(self) -> int:
        """From the lock to the decision.

        Raises:
            CannotWriteError: another job has the run folder, or a file cannot be written.
            InfrastructureError: the scheduler did not answer for an hour.
        """
        with ExitStack() as held:
            if self.spec.work not in ASKS_ONCE:
                held.enter_context(run_lock(self.folder, self.job_id, self.restart, is_alive=is_alive))
            if self.spec.shakedown and self.spec.work == "train" and self.restart == 0:
                start_afresh(self.folder)
            late = self._file_late_ends()
            facts = commands.job_facts(self.job_id, patience_s=commands.PATIENCE_S)
            self.nodes = facts.nodes
            if (overdue := self._catch_up(late, facts)) is not None:
                self._tell(overdue)
                return carry_out(self, overdue, facts)
            self._begin(facts)
            cause, facts = self._attempt(facts)
            decision = self._decide(cause)
            self._tell(decision, cause)
            return carry_out(self, decision, facts)

    def _file_late_ends(self) -> list[tuple[Record, Decision]]:
        """File what earlier supervisors could not, and decide what should have followed. Only who holds the run's lock
        knows that they are gone."""
        found: list[tuple[Record, Decision]] = []
        if self.spec.work in ASKS_ONCE:
            return found
        for end, cause in file_unfinished(self.ledger, self.folder, self.job_id, patience_s=commands.PATIENCE_S):
            say(f"start {end['restart'] + 1} of job {end['job']} left no verdict; filed now: {cause.message}")
            found.append((end, decide(cause, self.ledger.records(), self.spec.cluster.limits)))
        return found

    def _catch_up(self, late: Sequence[tuple[Record, Decision]], facts: commands.JobFacts) -> Decision | None:
        """Do what should have followed, where it still matters: exclude bad nodes, and hold a crash loop."""
        if self.spec.shakedown or self.spec.work in ASKS_ONCE:
            return None
        for end, decision in late:
            if end["job"] == self.job_id and decision.action == "hold":
                return decision
            if decision.action in ("requeue", "hold"):
                exclude_later_jobs(self, decision, facts)
        return None

    def _begin(self, facts: commands.JobFacts) -> None:
        """Make the attempt's folder and write down that it starts."""
        with suppress(MoeRecipesError):  # an index for the operator's commands; the run does without
            note_job(self.spec.cluster.paths.runs, self.job_id, self.folder.path)
        self.first_step = durable_step(self.folder)
        self.attempt = self.folder.new_attempt()
        number = int(self.attempt.name)
        if self.uses_status:
            self.folder.write_status("starting")
            self.folder.append_event(
                "start", attempt=number, job=self.job_id, restart=self.restart, nodes=list(self.nodes)
            )
        self.write("start", first_step=self.first_step, work=self.spec.work)
        write_json(
            self.attempt / "job.json",
            {
                "job": self.job_id,
                "restart": self.restart,
                "nodes": list(self.nodes),
                "master": facts.nodes[0] if facts.nodes else None,
                "image": self.spec.cluster.container.image,
                "spec": str(self.folder.slurm / self.job_id / "spec.json"),
            },
        )
        say(f"job {self.job_id}, start {self.restart + 1}: attempt {number} of {self.folder.path}, {self.spec.work}")
        say(f"{len(self.nodes)} nodes ({','.join(self.nodes)}), {self.spec.num_ranks} tasks; logs: {self.attempt}")

    def _attempt(self, facts: commands.JobFacts) -> tuple[Cause, commands.JobFacts]:
        """Run the ranks to their end; why they ended, and what Slurm says of the job then."""
        assert self.attempt is not None
        try:
            estimate = estimated_times(self.spec.read_recipe(), self.spec.cluster.limits, self.spec.num_nodes)
            if self.uses_status:
                self._check_time(facts, estimate)
            if self.spec.work == "preflight" or (self.spec.work == "train" and self.spec.cluster.limits.preflight):
                cause = preflight_cause(self.spec, facts, self.attempt, stop=lambda: self.signals.is_ending)
                if self.spec.work == "preflight" or not (cause.exit_code == EXIT_OK or self.signals.is_ending):
                    return cause, facts
            command = srun_command(self.spec, facts, attempt=self.attempt)
            environ = srun_environment(self.spec, facts, os.environ)
            process, copy = start_srun(command, environ, self.attempt)
        except (MoeRecipesError, OSError) as error:
            code = getattr(error, "exit_code", EXIT_INTERNAL)
            return Cause(kind=KIND_OF_CODE.get(code, "internal"), exit_code=code, message=str(error)), facts
        watch = Watch(
            process=process,
            folder=self.folder,
            attempt=self.attempt,
            job=facts,
            limits=self.spec.cluster.limits,
            estimate=estimate,
            signals=self.signals,
            note=self._note_signal,
            may_hang=self.uses_status,
        )
        code = watch.run()
        copy.join(timeout=0.0 if code is None else 5.0)
        wait_for_endings(self.attempt, code, stop=lambda: self.signals.is_ending)
        state, facts = slurm_state(facts, self.restart, is_ending=self.signals.is_ending)
        cause = find_cause(
            self.folder, self.attempt, code, slurm_state=state, asked=watch.asked, uses_status=self.uses_status
        )
        if cause.kind == "hang" and watch.odd is not None:
            cause = _name_odd_rank(cause, watch.odd, self)
        return cause, facts

    def _check_time(self, facts: commands.JobFacts, estimate: Times) -> None:
        remaining_s = None if facts.end_time is None else facts.end_time - time.time()
        check_walltime(self.folder, remaining_s, estimate)
        if remaining_s is not None:
            lead_s = measured_times(self.folder, estimate).signal_lead_s
            say(
                f"the job ends in {remaining_s / 60:.0f} min; its ranks are told {lead_s:.0f} s before, as measured now"
            )

    def _note_signal(self, what: str, reason: str) -> None:
        try:
            self.write("signal", signal=what, reason=reason)
        except CannotWriteError as error:
            say(str(error), failed=True)  # the watch goes on: the ranks may still save
        say(f"{what} to the ranks: {reason}")

    def _decide(self, cause: Cause) -> Decision:
        """Write the end, then decide with it."""
        step = durable_step(self.folder) if self.uses_status else 0
        self.write("end", first_step=self.first_step, durable_step=step, **cause_fields(cause))
        if self.uses_status:
            self._leave_status(cause)
        decision = decide(cause, self.ledger.records(), self.spec.cluster.limits)
        if self.spec.work in ASKS_ONCE and decision.action in ("requeue", "hold"):
            return replace(decision, action="fail", exit_code=cause.exit_code, exclude=None)
        if self.spec.shakedown:
            decision = replace(decision, exclude=None)  # it kills a rank on purpose
            if decision.action != "requeue" and self.uses_status:
                passed = write_verdict(self.folder)
                say(f"shakedown {'PASS' if passed else 'FAIL'}: {self.folder.path / 'shakedown.json'}")
                if decision.action == "done" and not passed:
                    reason = "the run is done, but the shakedown's checks failed"
                    return Decision(action="fail", exit_code=EXIT_NOT_FINITE, exclude=None, reason=reason)
        return decision

    def _leave_status(self, cause: Cause) -> None:
        """Note the end where a local run notes it, and say how the ranks ended where they could not."""
        assert self.attempt is not None
        self.folder.append_event("end", attempt=int(self.attempt.name), exit_code=cause.exit_code)
        if (self.folder.read_status() or {}).get("state") not in TERMINAL_STATES:
            states: dict[int, State] = {EXIT_OK: "done", EXIT_REQUEUE: "stopped"}
            self.folder.write_status(
                states.get(cause.exit_code, "failed"),
                cause=cause.message,
                rank=cause.rank,
                host=cause.node,
                exit_code=cause.exit_code,
            )

    def _tell(self, decision: Decision, cause: Cause | None = None) -> None:
        if cause is not None:
            where = f"; {cause.log}:{cause.line}" if cause.log else ""
            say(f"{cause.kind}: {cause.message}{where}", failed=cause.exit_code not in (EXIT_OK, EXIT_REQUEUE))
        step = durable_step(self.folder)
        follows = {
            "done": "nothing is left to do",
            "requeue": f"the job is requeued and goes on after step {step}",
            "hold": f"the job is held ({decision.reason}); mend it, then: scontrol release {self.job_id}",
            "fail": f"the job ends with exit code {decision.exit_code} and is not requeued",
        }
        say(f"next: {follows[decision.action]}")


def _name_odd_rank(cause: Cause, odd: tuple[int, str], start: Start) -> Cause:
    rank, does = odd
    assert start.attempt is not None
    log = start.attempt / f"rank-{rank:05d}.log"
    node = None
    if start.nodes and rank // start.spec.tasks_per_node < len(start.nodes):
        node = start.nodes[rank // start.spec.tasks_per_node]
    message = f"no progress: rank {rank} on {node} {does}; the stacks of all ranks are in their logs"
    return replace(cause, message=message, rank=rank, node=node, log=str(log), line=None)


def is_alive(job_id: str) -> bool:
    """Whether Slurm still has that job, waiting, running or stopped."""
    try:
        state = commands.job_facts(job_id, patience_s=commands.PATIENCE_S).state
    except MissingInputError:
        return False
    return state not in commands.OVER
