"""The files of a test cluster, and the ports it listens on."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

ACCOUNT, QOS = "research", "urgent"
# Above the range 20000-31999 from which jobs take their MASTER_PORT, below the kernel's ephemeral ports.
FIRST_PORT, PORTS_A_LAB, NUM_LABS = 32000, 32, 23
MOST_NODES = PORTS_A_LAB - 8

_SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=10
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageEnforce=associations,qos
AccountingStoreFlags=job_comment,job_env,job_script
AccountingStorageHost=localhost
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.sock
AccountingStorageTRES=gres/gpu
GresTypes=gpu
PlugStackConfig={folder}/plugstack.conf
NodeName=DEFAULT Sockets=2 CoresPerSocket=56 ThreadsPerCore=1 RealMemory=2000000
NodeName=node[1-{nodes}] NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}] Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

_SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pidfile
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


class LabError(AssertionError):
    """The lab did not do what it was asked; the test fails."""


def take_ports(num_nodes: int) -> tuple[IO[str], int]:
    """A lock that holds a range of ports while it is open, and the number of the range.

    Raises:
        LabError: every range is taken.
    """
    for slot in range(NUM_LABS):
        lock = (Path(tempfile.gettempdir()) / f"slurm-lab-ports-{slot}.lock").open("w")
        first = FIRST_PORT + slot * PORTS_A_LAB
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if all(_is_free(port) for port in range(first, first + 2 + num_nodes)):
                return lock, slot
        lock.close()
    raise LabError("no free ports for another lab")


def write_files(folder: Path, slot: int, num_nodes: int, gpus_per_node: int, plugstack: Sequence[str]) -> None:
    """Everything the daemons read, and the devices that stand for GPUs."""
    for name in ("state", "log", "dev", "db"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for number in range(gpus_per_node):
        os.mknod(folder / "dev" / f"nvidia{number}", 0o666 | 0o020000, os.makedev(1, 3))
    _private(folder / "munge.key").write_bytes(os.urandom(1024))
    host = socket.gethostname().split(".")[0]
    names = "".join(f"127.0.1.{number} node{number}\n" for number in range(1, num_nodes + 1))
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host}\n{names}")
    port = FIRST_PORT + slot * PORTS_A_LAB
    # Jobs take their MASTER_PORT by job id: other ids, other ports than those of a lab beside this one.
    facts = {"folder": folder, "host": host, "port": port, "dbd_port": port + 1, "first_job": slot * 500 + 1}
    facts |= {"nodes": num_nodes, "gpus": gpus_per_node, "node_port": port + 2, "last_port": port + 1 + num_nodes}
    (folder / "slurm.conf").write_text(_SLURM_CONF.format(**facts))
    devices = f"{folder}/dev/nvidia[0-{gpus_per_node - 1}]"
    (folder / "gres.conf").write_text(f"NodeName=node[1-{num_nodes}] Name=gpu File={devices}\n")
    (folder / "plugstack.conf").write_text("".join(f"{line}\n" for line in plugstack))
    _private(folder / "slurmdbd.conf").write_text(_SLURMDBD_CONF.format(**facts))


def _private(path: Path) -> Path:
    path.touch(0o600)
    return path


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return True
    return False
