"""Opening files that somebody else may have put there: no links, no devices, no file of another user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moe_recipes.config.errors import CorruptCheckpointError


def open_trusted(path: Path) -> int:
    """A descriptor of a regular file for reading; its name leads nowhere else, and its owner is one of ``owners``.

    Raises:
        CorruptCheckpointError: it is not there, or it is refused; names the file and the reason.
    """
    try:
        # Without O_NONBLOCK a pipe of this name would hold the process for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise refused(path, "it is a symbolic link") from error
        raise CorruptCheckpointError(f"{path}: {error.strerror}; the checkpoint is incomplete") from error
    found = os.fstat(fd)
    reason = None
    if not stat.S_ISREG(found.st_mode):
        reason = "it is not a regular file"
    elif found.st_uid not in owners(path.parent.parent):
        reason = f"it belongs to user {found.st_uid}, not to user {os.geteuid()}"
    if reason is not None:
        os.close(fd)
        raise refused(path, reason)
    return fd


def read_trusted(path: Path, *, max_bytes: int) -> bytes:
    """All bytes of such a file.

    Raises:
        CorruptCheckpointError: as ``open_trusted``, or it has more bytes than such a file can have.
    """
    with open(open_trusted(path), "rb") as file:
        if (num_bytes := os.fstat(file.fileno()).st_size) > max_bytes:
            raise refused(path, f"it has {num_bytes} bytes, more than any such file")
        return file.read()


def size_of(path: Path) -> int:
    """Bytes of such a file; raises as ``open_trusted``."""
    fd = open_trusted(path)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def check_folder(path: Path) -> None:
    """Accept the folder of a checkpoint.

    Raises:
        CorruptCheckpointError: it is no folder, or a link to one, or another user's.
    """
    try:
        found = os.lstat(path)
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise refused(path, "it is a symbolic link")
    if not stat.S_ISDIR(found.st_mode):
        raise refused(path, "it is not a folder")
    if found.st_uid not in owners(path.parent):
        raise refused(path, f"it belongs to user {found.st_uid}, not to user {os.geteuid()}")


def owners(ckpt_dir: Path) -> set[int]:
    """Users whose checkpoints are read: this one and root; for root, who may be a container's, also the owner of the
    folder of checkpoints."""
    users = {os.geteuid(), 0}
    if os.geteuid() == 0:
        try:
            users.add(os.stat(ckpt_dir).st_uid)
        except OSError:
            return users
    return users


def refused(path: Path, reason: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path} is refused: {reason}; copy it yourself if you trust it (cp -rL)")
