"""One task of the srun, inside the container: it starts one rank as a child, and leaves how that rank ended.

``python3 -m moe_recipes.launch.slurm.task SPEC ATTEMPT``

The child's output goes to ``ATTEMPT/rank-NNNNN.log``, rank 0's to stdout as well. SIGTERM and SIGUSR2 are passed on
once, SIGUSR1 (print your stacks) each time. Tokens are read here and only the child has them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from moe_recipes.config.errors import EXIT_CANNOT_WRITE, EXIT_OK, EXIT_REQUEUE, InfrastructureError, MoeRecipesError
from moe_recipes.config.run_folder import now, write_json
from moe_recipes.launch.local import die_with_parent, tee_output
from moe_recipes.launch.secrets import read_secrets
from moe_recipes.launch.slurm.endings import LATE_FILES_S
from moe_recipes.launch.slurm.probe import write_probe
from moe_recipes.launch.slurm.spec import JobSpec, read_spec
from moe_recipes.launch.train import prepare_rank, rank_command
from moe_recipes.launch.words import ERROR_PREFIX, rank_log

PASSED_ON_ONCE = (signal.SIGTERM, signal.SIGUSR2)
OTHERS_S = 60.0
"""How long a rank that saved waits for the others to say so: srun ends all tasks at the first exit that is not 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this task; the exit code is the rank's, or 128 + the signal that killed it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    attempt = Path(words[1])
    _wait_to_see(Path(words[0]), attempt)
    try:
        spec = read_spec(words[0])
        rank, variables = rank_variables(os.environ, spec)
    except MoeRecipesError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    try:
        log = rank_log(attempt, rank).open("ab", buffering=0)
    except OSError as error:
        print(
            f"{ERROR_PREFIX}{attempt}: no log can be written on {socket.gethostname()}: {error.strerror}",
            file=sys.stderr,
        )
        return EXIT_CANNOT_WRITE
    with log:
        try:
            code, cause = _work(spec, attempt, rank, variables, log), None
        except MoeRecipesError as error:
            cause, code = str(error), error.exit_code
            _say(f"{ERROR_PREFIX}{error}\n", log, also_here=rank == 0)
    _leave(attempt, rank, code, cause)
    if code == EXIT_REQUEUE:
        _wait_for_others(attempt, spec.num_ranks)
    return code if code >= 0 else 128 - code


def _wait_to_see(*paths: Path) -> None:
    """Until this node sees what the batch host has just made; what is still not there then is said by who reads it."""
    deadline = time.monotonic() + LATE_FILES_S
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.5)


def rank_variables(environ: Mapping[str, str], spec: JobSpec) -> tuple[int, dict[str, str]]:
    """This task's rank, and what its child is told about it.

    Raises:
        InfrastructureError: srun started another number of tasks, or its variables did not come through.
    """
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MOE_MASTER_ADDR", "MOE_MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if missing:
        raise InfrastructureError(f"{', '.join(missing)} did not reach the task; the container hides srun's variables")
    size = environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])
    if int(size) != spec.num_ranks:
        raise InfrastructureError(f"srun started {size} tasks, but the job has {spec.num_ranks} ranks")
    rank = int(environ["SLURM_PROCID"])
    return rank, {
        "RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(spec.tasks_per_node),
        "MASTER_ADDR": environ["MOE_MASTER_ADDR"],
        "MASTER_PORT": environ["MOE_MASTER_PORT"],
    }


def _work(spec: JobSpec, attempt: Path, rank: int, variables: Mapping[str, str], log: IO[bytes]) -> int:
    environ = {**os.environ, **variables}
    if spec.cluster.paths.secrets is not None:
        environ |= read_secrets(spec.cluster.paths.secrets)
    if spec.work == "probe":
        write_probe(spec, attempt, rank, environ)
        return EXIT_OK
    return _run_child(_child_command(spec, attempt, rank), environ, log, also_here=rank == 0)


def _child_command(spec: JobSpec, attempt: Path, rank: int) -> list[str]:
    """What runs as the rank. Training prepares its run folder first, as under any other launcher."""
    if spec.work == "preflight":
        return [sys.executable, "-m", "moe_recipes.launch.preflight.task", str(attempt)]
    recipe, folder = spec.read_recipe(), spec.folder
    if spec.work == "bench":
        out = [] if "--out" in spec.bench_words else ["--out", str(folder.path / "bench.json")]
        return [sys.executable, "-m", "moe_recipes.bench", spec.recipe_file, *out, *spec.bench_words]
    if spec.work == "export":
        return rank_command("moe_recipes.train.export_run", folder, recipe, cpu=False)
    prepare_rank(recipe, folder, rank)
    return rank_command("moe_recipes.train", folder, recipe, cpu=False)


def _run_child(command: Sequence[str], environ: Mapping[str, str], log: IO[bytes], *, also_here: bool) -> int:
    """The child's return code; minus the signal if one killed it."""
    sent: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number not in sent or number == signal.SIGUSR1:
            sent.append(number)
            if child is not None:
                child.send_signal(number)

    for number in (*PASSED_ON_ONCE, signal.SIGUSR1):
        signal.signal(number, pass_on)
    child = subprocess.Popen(
        list(command),
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if also_here else log,
        stderr=subprocess.STDOUT,
        bufsize=0,
        preexec_fn=die_with_parent,
    )
    for early in sent:  # came while the child was being started
        child.send_signal(early)
    tee = None
    if also_here:
        tee = threading.Thread(target=tee_output, args=(child.stdout, log, sys.stdout.buffer), daemon=True)
        tee.start()
    code = child.wait()
    if tee is not None:
        tee.join(timeout=5.0)
    return code


def _leave(attempt: Path, rank: int, code: int, cause: str | None) -> None:
    """Write how the rank ended; a file system that takes no file must not hide the rank's own code."""
    ending: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "exit_code": code if code >= 0 else None,
        "signal": signal.Signals(-code).name if code < 0 else None,
        "time": now(),
    }
    if cause is not None:
        ending["cause"] = cause
    try:
        write_json(attempt / f"rank-{rank:05d}.exit.json", ending)
    except MoeRecipesError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)


def _wait_for_others(attempt: Path, num_ranks: int) -> None:
    """All ranks agreed to save and leave; return when each has left its ending, or after ``OTHERS_S``."""
    deadline = time.monotonic() + OTHERS_S
    while time.monotonic() < deadline:
        if sum(item.name.endswith(".exit.json") for item in attempt.iterdir()) >= num_ranks:
            return
        time.sleep(0.2)


def _say(text: str, log: IO[bytes], *, also_here: bool) -> None:
    log.write(text.encode())
    if also_here:
        print(text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
