"""What the system lets a process of this node have: shared memory, locked memory, open files, the right time."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from moe_recipes.launch.preflight.clock import clock_offset_s
from moe_recipes.launch.preflight.probe import Probe, at_least, failed, not_available, passed

SHM_BYTES_A_TASK = 256 * 2**20
"""NCCL's and the data loader's buffers of one rank."""

OPEN_FILES_A_RANK = 8
"""Sockets and files that a rank keeps open for every other rank: gloo pairs, NCCL's bootstrap, checkpoint shards."""

MOST_OPEN_FILES_NEEDED = 65536
MOST_CLOCK_OFFSET_S = 1.0


def shared_memory(tasks: int, floor_gib: float | None = None, folder: str = "/dev/shm") -> Probe:
    """Free bytes of ``/dev/shm`` for the tasks of this node, or against the cluster file's floor in GiB."""
    status = os.statvfs(folder)
    floor = tasks * SHM_BYTES_A_TASK if floor_gib is None else int(floor_gib * 2**30)
    mend = f"{folder} is too small; enlarge the tmpfs or remove what earlier jobs left in it"
    return at_least(status.f_bavail * status.f_frsize, floor, mend)


def locked_memory(infiniband: str = "/sys/class/infiniband") -> Probe:
    """RDMA registers memory by locking it: the limit must be off where there is an InfiniBand or RoCE device."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "unlimited" if soft == resource.RLIM_INFINITY else soft
    devices = sorted(device.name for device in Path(infiniband).iterdir()) if Path(infiniband).is_dir() else []
    if not devices:
        return not_available("no InfiniBand or RoCE device on this node, which alone needs it", value=value)
    if soft == resource.RLIM_INFINITY:
        return passed(value, floor="unlimited")
    mend = f"{', '.join(devices)} cannot register memory; set LimitMEMLOCK=infinity for slurmd, PropagateResourceLimits"
    return failed(f"{mend} as the site does", value=value, floor="unlimited")


def open_files(num_ranks: int) -> Probe:
    """The soft limit of open files against what a job of ``num_ranks`` ranks opens in one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    floor = min(MOST_OPEN_FILES_NEEDED, 1024 + OPEN_FILES_A_RANK * num_ranks)
    if soft == resource.RLIM_INFINITY:
        return passed("unlimited", floor=floor)
    return at_least(soft, floor, f"too few open files a process (hard limit {hard}); raise `ulimit -n` for slurmd")


def clock(server: tuple[str, int] | None, most_s: float = MOST_CLOCK_OFFSET_S) -> Probe:
    """Seconds between this node's clock and the batch host's; the floor is the most that passes."""
    if server is None:
        return not_available("no clock to compare with was named")
    try:
        offset = clock_offset_s(*server)
    except OSError as error:
        reason = error.strerror or str(error)
        return failed(f"the batch host {server[0]}:{server[1]} cannot be reached: {reason}", floor=most_s)
    offset = round(offset, 4) + 0.0  # no minus zero
    if abs(offset) > most_s:
        ahead = "ahead of" if offset > 0 else "behind"
        return failed(
            f"the clock is {abs(offset):.1f} s {ahead} the batch host's; mend NTP", value=offset, floor=most_s
        )
    return passed(offset, floor=most_s)
