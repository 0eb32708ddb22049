"""One job at a time in a run folder: ``RUN/slurm/lock.json`` names it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.config.run_folder import RunFolder, now


@contextmanager
def run_lock(folder: RunFolder, job: str, restart: int, *, is_alive: Callable[[str], bool]) -> Iterator[None]:
    """Hold the run folder for a job. A job takes over its own earlier start's lock, and that of a job that is gone.

    Args:
        is_alive: whether Slurm still has that job; asked only where another job's lock is there.
    Raises:
        CannotWriteError: another job has the folder, or it cannot be written.
    """
    path = folder.slurm / "lock.json"
    mine = {"job": job, "restart": restart, "host": socket.gethostname(), "pid": os.getpid(), "time": now()}
    temporary = path.with_name(f".lock-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(mine))
        with one_writer(path):
            other = _read(path)
            if other is not None and other["job"] != job and is_alive(str(other["job"])):
                raise _taken(folder, other)
            path.unlink(missing_ok=True)
            os.link(temporary, path)  # whole at once, and an error where another host was quicker
    except OSError as error:
        raise CannotWriteError(
            f"{path}: cannot be written: {error.strerror}; free space, or set another run_dir"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    try:
        yield
    finally:
        if _read(path) == mine:
            with suppress(OSError):
                path.unlink()


@contextmanager
def local_lock(folder: RunFolder, *, is_alive: Callable[[str], bool]) -> Iterator[None]:
    """Hold the run folder for this process, which is no job of Slurm. The lock ends with the process.

    Args:
        is_alive: whether Slurm still has a job; asked only where a job's lock is there.
    Raises:
        CannotWriteError: a job or another such process has the folder, or it cannot be written.
    """
    other = _read(folder.slurm / "lock.json")
    if other is not None and is_alive(str(other["job"])):
        raise _taken(folder, other)
    path = folder.path / ".local.lock"
    try:
        file = path.open("ab")
    except OSError as error:
        raise CannotWriteError(
            f"{path}: cannot be written: {error.strerror}; free space, or set another run_dir"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # anything else: a file system without locks
                raise CannotWriteError(
                    f"{folder.path}: another `moe-recipes train` or `export` works in this run folder; wait for it, or"
                    " set another run_dir"
                ) from error
        yield


def _taken(folder: RunFolder, lock: dict[str, Any]) -> CannotWriteError:
    return CannotWriteError(
        f"{folder.path}: job {lock['job']} works in this run folder since {lock['time']};"
        f" wait for it, cancel it (scancel {lock['job']}), or set another run_dir"
    )


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """One process at a time, on any host, changes ``path``. The lock ends with its process.

    On a file system without locks (Lustre mounted without ``flock``) there is none: two that write within the same
    moment may then lose one of two changes.
    """
    with path.with_name(f".{path.name}.guard").open("ab") as file:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any] | None:
    """Whose lock it is; None if it went away or is damaged."""
    try:
        lock = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return lock if isinstance(lock, dict) and "job" in lock and "time" in lock else None
