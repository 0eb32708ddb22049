"""Slurm's commands with types, time-outs and patience: the one place that starts them and reads what they print.

``patience_s`` is how long a call goes on asking while the scheduler does not answer. A command on a login node asks
once; the supervisor of a job waits, because an hour without slurmctld must not cost a run.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moe_recipes.config.errors import (
    EnvironmentMismatchError,
    InfrastructureError,
    MissingInputError,
    RecipeError,
)
from moe_recipes.launch.slurm.parse import NOTHING, epoch, limit_s, or_none, pairs

TIMEOUT_S = 60.0
PATIENCE_S = 3600.0
"""How long the supervisor of a job asks again while slurmctld is away."""

RETRY_S = (1.0, 2.0, 5.0, 10.0, 20.0)
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Where the cluster is, not which job this is: a submission from inside a job needs them."""

OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
"""States of a job that has no process any more. All others, STOPPED and STAGE_OUT among them, may still have some."""

AWAY = re.compile(
    r"Unable to contact slurm controller|Connection refused|Socket timed out|Zero Bytes were transmitted"
    r"|Transport endpoint is not connected|Unable to connect to slurmdbd|slurm_persist_conn_open"
    r"|Slurm backup controller in standby|Communication connection failure|Resource temporarily unavailable",
    re.IGNORECASE,
)
_UNKNOWN_JOB = "Invalid job id specified"


class SlurmRefusedError(RecipeError):
    """Slurm answered and said no; the message is Slurm's own."""


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What ``scontrol show job`` knows of a job. Times are seconds since 1970."""

    job_id: str
    name: str
    state: str
    nodes: tuple[str, ...]
    """Allocated nodes in rank order; empty while the job waits."""

    num_nodes: int
    start_time: float | None
    end_time: float | None
    """When the time limit ends the job."""

    time_limit_s: int | None
    """None without a limit."""

    restart_count: int
    partition: str
    account: str | None
    qos: str | None
    reason: str | None
    exclude: tuple[str, ...]
    comment: str | None
    batch_host: str | None


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One start of a job in the accounting, restarts included; ``sacct -D``."""

    job_id: str
    state: str
    """The first word of Slurm's state: ``CANCELLED`` of ``CANCELLED by 0``."""

    exit_code: int
    signal: int
    nodes: tuple[str, ...]
    reason: str | None
    start_time: float | None
    end_time: float | None
    partition: str
    by: str | None = None
    """User id that cancelled the job."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """A node of a partition as ``sinfo`` shows it."""

    name: str
    state: str
    cpus: int
    memory_mib: int
    gres: str
    reason: str | None = None

    @property
    def gpus(self) -> int:
        return sum(int(number) for number in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", self.gres))

    @property
    def gpu_type(self) -> str | None:
        match = re.search(r"gpu:([^:,()\d][^:,()]*):\d+", self.gres)
        return match[1] if match else None


def slurm_command(
    words: Sequence[str],
    *,
    patience_s: float = 0.0,
    timeout_s: float = TIMEOUT_S,
    environ: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> str:
    """Run one of Slurm's commands; its stdout.

    Args:
        patience_s: how long to ask again while the scheduler does not answer.
        environ: the whole environment of the command; this process's, if not given.
    Raises:
        EnvironmentMismatchError: this host has no such command.
        InfrastructureError: the scheduler does not answer.
        MissingInputError: Slurm knows no such job.
        SlurmRefusedError: Slurm said no.
    """
    done = run_slurm(words, patience_s=patience_s, timeout_s=timeout_s, environ=environ, stdin=stdin)
    if done.returncode == 0:
        return done.stdout
    said = slurm_said(done.stderr) or f"exit code {done.returncode}"
    if _UNKNOWN_JOB in said:
        raise MissingInputError(f"{words[0]}: {said}: Slurm knows no such job (it forgets ended ones after minutes)")
    raise SlurmRefusedError(f"{words[0]}: {said}")


def run_slurm(
    words: Sequence[str],
    *,
    patience_s: float = 0.0,
    timeout_s: float = TIMEOUT_S,
    environ: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """As ``slurm_command``, but the caller judges the exit code."""
    path = shutil.which(words[0])
    if path is None:
        raise EnvironmentMismatchError(f"this host has no {words[0]}; run this where Slurm's commands are in PATH")
    deadline = time.monotonic() + patience_s
    # Sites set the format of times for their users; only the standard one can be read back.
    whole = {**(os.environ if environ is None else environ), "SLURM_TIME_FORMAT": "standard"}
    for tried in itertools.count():
        try:
            done = subprocess.run(
                [path, *words[1:]],
                env=whole,
                input=stdin if stdin is not None else "",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
            if done.returncode == -signal.SIGTERM and tried == 0:
                continue  # Slurm has just begun to end this job, and signals all of its processes once
            if done.returncode == 0 or not AWAY.search(done.stderr):
                return done
            said = slurm_said(done.stderr)
        except subprocess.TimeoutExpired:
            said = f"no answer in {timeout_s:g} s"
        wait_s = RETRY_S[min(tried, len(RETRY_S) - 1)]
        if time.monotonic() + wait_s > deadline:
            break
        time.sleep(wait_s)
    waited = f"after {patience_s:g} s" if patience_s else "now"
    raise InfrastructureError(f"{words[0]}: the scheduler does not answer {waited}: {said}; try again later")


def slurm_said(stderr: str) -> str:
    """Slurm's message on one line, without the command's own prefixes."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))


def job_facts(job_id: str, *, patience_s: float = 0.0) -> JobFacts:
    """What the scheduler knows of a job that waits, runs, or ended minutes ago.

    Raises:
        MissingInputError: it knows no such job.
    """
    fields = pairs(slurm_command(["scontrol", "show", "job", check_job_id(job_id)], patience_s=patience_s))
    return JobFacts(
        job_id=fields["JobId"],
        name=fields.get("JobName", ""),
        state=fields["JobState"],
        nodes=hostnames(fields.get("NodeList", ""), patience_s=patience_s),
        num_nodes=int(fields.get("NumNodes", "0").split("-")[0]),
        start_time=epoch(fields.get("StartTime", "")),
        end_time=epoch(fields.get("EndTime", "")),
        time_limit_s=limit_s(fields.get("TimeLimit", "")),
        restart_count=int(fields.get("Restarts", "0")),
        partition=fields.get("Partition", ""),
        account=or_none(fields.get("Account", "")),
        qos=or_none(fields.get("QOS", "")),
        reason=or_none(fields.get("Reason", "")),
        exclude=hostnames(fields.get("ExcNodeList", ""), patience_s=patience_s),
        comment=or_none(fields.get("Comment", "")),
        batch_host=or_none(fields.get("BatchHost", "")),
    )


def sacct_records(job_id: str, *, patience_s: float = 0.0) -> list[JobRecord]:
    """Every start of a job, oldest first. Empty where the accounting does not know it, does not answer within
    ``patience_s`` seconds, or is not there: it tells more of a cause, but no run may hang on it."""
    columns = "JobIDRaw,State,ExitCode,NodeList,Reason,Start,End,Partition"
    words = ["sacct", "-D", "-X", "-P", "-n", "-j", check_job_id(job_id), "-o", columns]
    try:
        done = run_slurm(words, patience_s=patience_s)
    except InfrastructureError:
        return []
    if done.returncode != 0:
        return []
    records = []
    for line in done.stdout.splitlines():
        raw_id, state, code, nodes, reason, start, end, partition = line.split("|")[:8]
        exit_code, _, signum = code.partition(":")
        first, _, rest = state.partition(" ")
        records.append(
            JobRecord(
                job_id=raw_id,
                state=first,
                exit_code=int(exit_code or 0),
                signal=int(signum or 0),
                nodes=hostnames(nodes, patience_s=patience_s),
                reason=or_none(reason),
                start_time=epoch(start),
                end_time=epoch(end),
                partition=partition,
                by=rest.removeprefix("by ") or None,
            )
        )
    return records


def hostnames(nodelist: str, *, patience_s: float = 0.0) -> tuple[str, ...]:
    """The names in a node list such as ``node[1-4,7]``, in Slurm's order."""
    if nodelist in NOTHING:
        return ()
    if "[" not in nodelist:
        return tuple(nodelist.split(","))
    return tuple(slurm_command(["scontrol", "show", "hostnames", nodelist], patience_s=patience_s).split())


def requeue(job_id: str, *, patience_s: float = PATIENCE_S) -> None:
    """Put a running job back into the queue; its processes get SIGTERM, this one too."""
    slurm_command(["scontrol", "requeue", check_job_id(job_id)], patience_s=patience_s)


def requeue_hold(job_id: str, reason: str, *, patience_s: float = PATIENCE_S) -> None:
    """Put a running job back into the queue, held until ``scontrol release``. The reason becomes its comment."""
    set_comment(job_id, reason, patience_s=patience_s)
    slurm_command(["scontrol", "requeuehold", check_job_id(job_id)], patience_s=patience_s)


def set_comment(job_id: str, comment: str, *, patience_s: float = PATIENCE_S) -> None:
    """Replace the job's comment, which ``squeue -O Comment`` and ``scontrol show job`` show; at most 250 characters."""
    text = re.sub(r"[^ -~]", "?", comment)[:250]
    slurm_command(["scontrol", "update", f"JobId={check_job_id(job_id)}", f"Comment={text}"], patience_s=patience_s)


def exclude_nodes(job_id: str, nodes: Iterable[str], *, patience_s: float = PATIENCE_S) -> None:
    """Replace the nodes that the job must not get. Slurm takes this for a job that waits, not for one that runs."""
    words = ["scontrol", "update", f"JobId={check_job_id(job_id)}", f"ExcNodeList={','.join(sorted(set(nodes)))}"]
    slurm_command(words, patience_s=patience_s)


def signal_job(job_id: str, name: str, *, patience_s: float = 0.0) -> None:
    """Send a signal to all steps of a job; ``name`` without SIG. ``12.0`` names one step."""
    slurm_command(["scancel", f"--signal={name}", check_job_id(job_id)], patience_s=patience_s)


def cancel_job(job_id: str, *, patience_s: float = 0.0) -> None:
    slurm_command(["scancel", check_job_id(job_id)], patience_s=patience_s)


def nodes_of_partition(partition: str, *, patience_s: float = 0.0) -> list[NodeFacts]:
    """The nodes of a partition.

    Raises:
        RecipeError: there is no such partition.
    """
    lines = slurm_command(
        ["sinfo", "-h", "-N", "-p", partition, "-o", "%N|%T|%c|%m|%G|%E"], patience_s=patience_s
    ).splitlines()
    if not lines:
        raise RecipeError(f"Slurm knows no partition {partition!r}, or it has no nodes; `sinfo -s` lists them")
    nodes = {}
    for line in lines:
        name, state, cpus, memory, gres, reason = line.split("|", 5)
        nodes[name] = NodeFacts(
            name=name,
            state=state.rstrip("*~#!%$@^-+"),
            cpus=int(cpus.rstrip("+")),
            memory_mib=int(memory.rstrip("+")),
            gres=gres,
            reason=None if reason == "none" else or_none(reason),
        )
    return list(nodes.values())


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what the job of this process was given: such variables would silently change what a new
    job or step asks for."""
    dropped = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SUBMITIT_", "PMI_", "PMIX_")
    return {name: value for name, value in environ.items() if name in KEPT_VARIABLES or not name.startswith(dropped)}


def check_job_id(job_id: str) -> str:
    """The id itself.

    Raises:
        RecipeError: it is no job or step id.
    """
    if not re.fullmatch(r"\d+(_\d+)?(\.(\d+|batch))?", job_id):
        raise RecipeError(f"{job_id!r} is no job id; it is the number that sbatch printed")
    return job_id
