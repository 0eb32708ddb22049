"""How much memory of this host a process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def free_bytes(
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Host memory that this process may still take: of the machine, and of each control group that it is in, such as a
    Slurm job's, where that has a limit."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, int(min([free, *(_free_in_group(folder, *names) for folder, names in _memory_groups(cgroup, own))])))


_UNIFIED = ("memory.max", "memory.current", "inactive_file")
_OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Limit, use, and what of that use the kernel gives back, in the two versions of control groups."""


def _memory_groups(cgroup: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the groups, from this process's own up to what is mounted here as the root."""
    lines = own.read_text().splitlines() if own.is_file() else ["0::/"]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "" or "memory" in controllers.split(","):
            root, names = (cgroup / "memory", _OLD) if controllers else (cgroup, _UNIFIED)
            inside = Path(path.lstrip("/"))
            yield from ((root / part, names) for part in (inside, *inside.parents))


def _free_in_group(folder: Path, limit: str, used: str, returned: str) -> float:
    """Bytes; infinite where there is no such group here, or its limit is the word "max"."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        room = int((folder / limit).read_text()) - int((folder / used).read_text())
    except (OSError, ValueError):
        return float("inf")
    return room + int(stat.get(returned, 0))
