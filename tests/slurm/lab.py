"""A real Slurm of several nodes on this machine: slurmctld, slurmd, slurmdbd on MariaDB, munge, fake GPUs.

Every node is a process tree of its own with its own host name, process numbers and mounts: killing its first process
is a power loss. Files are shared with this machine, as on a cluster with one file system. Nothing of the machine's own
/etc is read or written, several labs can run side by side, and none outlives the process that started it.

`python -m tests.slurm.lab 4` starts one with 4 nodes, prints how to talk to it, and ends it with Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from tests.slurm.lab_files import ACCOUNT, MOST_NODES, QOS, LabError, take_ports, write_files

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db", "unshare")
ENDED = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())
_PR_SET_PDEATHSIG = 1
# Its first process takes all others with it: none is left, and no dead one for somebody else to collect.
_PROCESS_SPACE = ("unshare", "--pid", "--fork", "--kill-child=KILL")

# The first process of a node is a shell that waits: slurmd does not collect the job processes it inherits.
_NODE = """\
hostname {name}; mount --bind {folder}/hosts /etc/hosts
trap 'kill -TERM $daemon' TERM
slurmd -N {name} -D & daemon=$!
wait $daemon; wait $daemon
"""


class JobRecord(NamedTuple):
    """One line of ``sacct -D -P -X``: one start of a job."""

    job_id: str
    state: str
    """The first word only: CANCELLED, not "CANCELLED by 0"."""

    exit_code: str
    """``code:signal``"""

    nodes: str
    restarts: int


def why_not() -> str | None:
    """Why no lab can run here; None where one can."""
    if os.geteuid() != 0:
        return "the Slurm lab needs root: it makes nodes with mount and process namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"Slurm is not installed: no {', '.join(missing)}" if missing else None


class Lab:
    """A Slurm cluster: partitions main and high (high preempts main), nodes node1..nodeN with fake GPUs."""

    def __init__(
        self, folder: Path, num_nodes: int = 4, gpus_per_node: int = 8, *, plugstack: Sequence[str] = ()
    ) -> None:
        """
        Args:
            folder: an empty or absent folder with a short path: sockets live in it.
            plugstack: lines of plugstack.conf, such as ``required /path/plugin.so``.
        """
        if not 1 <= num_nodes <= MOST_NODES:
            raise ValueError(f"num_nodes must be 1 to {MOST_NODES}, not {num_nodes}")
        self.folder, self.num_nodes, self.gpus_per_node = Path(folder), num_nodes, gpus_per_node
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.conf = self.folder / "slurm.conf"
        self._plugstack = plugstack
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._port_lock: IO[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a login shell of this cluster."""
        dropped = ("SLURM_", "SBATCH_", "SUBMITIT_", "MOE_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        return {"USER": "root", "LOGNAME": "root"} | kept | {"SLURM_CONF": str(self.conf)}

    def up(self) -> Lab:
        """Start the cluster and wait until every node is idle."""
        if threading.current_thread() is not threading.main_thread():
            # The kernel ends the daemons with the thread that started them.
            raise LabError("start a lab from the main thread")
        atexit.register(self.down)
        try:
            self._port_lock, slot = take_ports(self.num_nodes)
            write_files(self.folder, slot, self.num_nodes, self.gpus_per_node, self._plugstack)
            self._start_accounting()
            self.slurmctld_start(wait=False)
            for node in self.nodes:
                self.power_on(node, wait=False)
            wait_until(lambda: self._states().count("idle") == self.num_nodes, 60, lambda: f"nodes: {self._states()}")
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """End every process of the lab, jobs included, at once. Safe to call twice."""
        for name in reversed(list(self._daemons)):
            self._end_daemon(name, signal.SIGKILL)
        if self._port_lock is not None:
            self._port_lock.close()
            self._port_lock = None
        atexit.unregister(self.down)

    def power_off(self, node: str, *, noticed: bool = True) -> None:
        """Kill everything on a node. Slurm notices by itself after about half a minute; ``noticed`` tells it now."""
        self._end_daemon(node, signal.SIGKILL)
        if noticed:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power-off")

    def power_on(self, node: str, *, wait: bool = True) -> None:
        """Boot a node, and wait until Slurm may use it."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        script = _NODE.format(name=node, folder=self.folder)
        spaces = [*_PROCESS_SPACE, "--uts", "--mount", "--mount-proc", "--propagation=private"]
        self._start_daemon(node, [*spaces, "bash", "-c", script])
        if wait:
            usable = ("idle", "mixed", "allocated", "completing")
            wait_until(lambda: self._state_of(node) in usable, 60, lambda: f"{node}: {self._state_of(node)}")

    def slurmctld_stop(self) -> None:
        """Stop the controller; jobs go on, commands fail until it is back."""
        self._end_daemon("slurmctld", signal.SIGTERM)

    def slurmctld_start(self, *, wait: bool = True) -> None:
        """Start the controller and wait until it answers."""
        self._start_daemon("slurmctld", [*_PROCESS_SPACE, "slurmctld", "-D"])
        if wait:
            self._wait_for_command("scontrol", "ping")

    def slurmdbd_stop(self) -> None:
        self._end_daemon("slurmdbd", signal.SIGTERM)

    def slurmdbd_start(self) -> None:
        self._start_daemon("slurmdbd", ["slurmdbd", "-D"], {"MYSQL_UNIX_PORT": f"{self.folder}/db.sock"})
        self._wait_for_command("sacctmgr", "-n", "show", "cluster")

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node, with ``env`` added to its environment.

        Raises:
            LabError: it failed and ``check`` is set; with its output.
        """
        words = [str(word) for word in command]
        environment = self.environment | dict(env or {})
        done = subprocess.run(words, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=300)
        if check and done.returncode != 0:
            raise LabError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sbatch(self, *words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Submit and return the job id. An output file that is not named lands in the lab's folder."""
        named = any(str(word).startswith(("-o", "--output")) for word in words)
        output = [] if named else [f"--output={self.folder}/slurm-%j.out", "--open-mode=append"]
        return self.run("sbatch", "--parsable", *output, *words, cwd=cwd, env=env).stdout.split(";")[0].strip()

    def output_of(self, job: str) -> str:
        """What a job of ``sbatch`` wrote so far."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def state_of(self, job: str) -> str:
        """The state of the newest start of a job; empty while Slurm knows no such job."""
        queued = self.run("squeue", "-h", "-j", job, "-o", "%T", check=False)
        if queued.returncode == 0 and queued.stdout.strip():
            return queued.stdout.split()[0]
        records = self.job_records(job)
        return records[-1].state if records else ""

    def reason_of(self, job: str) -> str:
        """Why a job waits, as squeue says."""
        return self.run("squeue", "-h", "-j", job, "-o", "%r", check=False).stdout.strip()

    def job_records(self, job: str) -> list[JobRecord]:
        """Every start of a job, the oldest first, as the accounting database has it."""
        fields = "JobIDRaw,State,ExitCode,NodeList,Submit"
        done = self.run("sacct", "-D", "-P", "-X", "-n", "-j", job, "-o", fields)
        rows = [line.split("|") for line in done.stdout.splitlines() if line]
        return [JobRecord(j, s.split()[0], code, nodes, n) for n, (j, s, code, nodes, _) in enumerate(rows)]

    def wait_for_state(self, job: str, states: str | Collection[str], deadline_s: float = 120) -> str:
        """Wait until a job is in one of ``states``.

        Raises:
            LabError: not within ``deadline_s`` seconds, or the job ended otherwise; with its output.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + deadline_s
        while (state := self.state_of(job)) not in wanted:
            # While Slurm requeues, an ended record may show for a moment: only a job that stays ended has ended.
            over = state in ENDED and self._stays_ended(job, state)
            if over or time.monotonic() > end:
                raise LabError(f"job {job} is {state or 'unknown'}, not {sorted(wanted)}:\n{self._story(job)}")
            time.sleep(0.1)
        return state

    def wait_for_end(self, job: str, deadline_s: float = 120) -> JobRecord:
        """Wait until a job has ended for good; its last record."""
        self.wait_for_state(job, ENDED, deadline_s)
        wait_until(lambda: self.job_records(job)[-1].state in ENDED, 20, lambda: self._story(job))
        return self.job_records(job)[-1]

    def wait_for(self, condition: Callable[[], Any], deadline_s: float, job: str | None = None) -> None:
        """Wait until ``condition`` holds; a LabError with the job's story if it does not."""
        wait_until(condition, deadline_s, lambda: self._story(job) if job else "the condition did not come true")

    def cancel_all(self) -> None:
        """Bring back what a test took away, and cancel every job."""
        if "slurmctld" not in self._daemons:
            self.slurmctld_start()
        self.run("scancel", "--user=root", check=False)
        self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        for node in self.nodes:
            if node not in self._daemons:
                self.power_on(node, wait=False)
        wait_until(lambda: not self.run("squeue", "-h").stdout.strip(), 120, lambda: self.run("squeue").stdout)
        wait_until(lambda: self._states().count("idle") == self.num_nodes, 120, lambda: f"nodes: {self._states()}")

    def _stays_ended(self, job: str, state: str) -> bool:
        time.sleep(1.0)
        return self.state_of(job) == state

    def _story(self, job: str) -> str:
        lines = [self.output_of(job)[-6000:], self.run("scontrol", "show", "job", job, check=False).stdout]
        return "\n".join([*lines, *map(str, self.job_records(job))])

    def _states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()

    def _state_of(self, node: str) -> str:
        return self.run("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T", check=False).stdout.strip()

    def _start_accounting(self) -> None:
        socket_path = f"--socket={self.folder}/munge.sock"
        files = [f"--{name}-file={self.folder}/munge.{end}" for name, end in (("key", "key"), ("pid", "pid"))]
        files += [f"--log-file={self.folder}/log/munge.log", f"--seed-file={self.folder}/munge.seed"]
        self._start_daemon("munged", ["munged", "--foreground", "--force", socket_path, *files])
        # Nothing of it outlives the lab: no write has to reach the disk.
        data = [f"--datadir={self.folder}/db", "--innodb-flush-method=nosync", "--innodb-log-file-size=4M"]
        install = ["mariadb-install-db", "--no-defaults", "--user=root", *data]
        (self.folder / "tmp").mkdir()
        own_tmp = {"TMPDIR": f"{self.folder}/tmp"}  # its temporary tables have names that two labs can share
        self.run(*install, "--auth-root-authentication-method=socket", "--skip-test-db", env=own_tmp)
        options = ["--skip-networking", "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
        database = ["mariadbd", "--no-defaults", "--user=root", *data, f"--socket={self.folder}/db.sock"]
        self._start_daemon("mariadbd", [*database, f"--pid-file={self.folder}/db.pid", *options], own_tmp)
        self._wait_for_command("mariadb-admin", "--no-defaults", f"--socket={self.folder}/db.sock", "ping")
        self.slurmdbd_start()
        # One process for all lines, and before the controller asks for them: a later one may miss some.
        user = f"add user root account={ACCOUNT} cluster=lab qos=normal,{QOS} defaultqos=normal"
        lines = ["add cluster lab", f"add qos {QOS}", f"add account {ACCOUNT} cluster=lab", user]
        self.run("sacctmgr", "-i", "-Q", stdin="\n".join([*lines, ""]))

    def _wait_for_command(self, *command: str) -> None:
        said = subprocess.CompletedProcess[str]((), 1, "", "")

        def answers() -> bool:
            nonlocal said
            said = self.run(*command, check=False)
            return said.returncode == 0

        wait_until(answers, 30, lambda: f"{' '.join(command)}: {said.stdout}{said.stderr}")

    def _start_daemon(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _end_daemon(self, name: str, signum: int) -> None:
        process = self._daemons.pop(name, None)
        if process is None:
            return
        # unshare ignores SIGTERM, and lives as long as its only child, the first process of the space.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        in_space = process.args[0] == _PROCESS_SPACE[0]
        with suppress(OSError):
            for pid in [int(word) for word in children.read_text().split()] if in_space else [process.pid]:
                os.kill(pid, signum)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], Any], deadline_s: float, story: Callable[[], str]) -> None:
    """Poll until ``condition`` is true; after ``deadline_s`` seconds a LabError with ``story``."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise LabError(f"not within {deadline_s:.0f} s: {story()}")
        time.sleep(0.05)


@contextmanager
def running_lab(num_nodes: int = 4, gpus_per_node: int = 8, *, plugstack: Sequence[str] = ()) -> Iterator[Lab]:
    """A lab in a new folder under /tmp, ended and removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    lab = Lab(folder, num_nodes, gpus_per_node, plugstack=plugstack)
    try:
        yield lab.up()
    finally:
        lab.down()
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _main() -> None:
    num_nodes = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running_lab(num_nodes) as lab, suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={lab.conf}", flush=True)
        signal.pause()


if __name__ == "__main__":
    _main()
