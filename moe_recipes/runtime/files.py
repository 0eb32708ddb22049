"""Small files and folders that survive a power cut: bytes, then names, are on disk when a call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a file in place and bring it to disk. For a file that nobody reads before a later rename."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a machine after a crash, finds the old or the new bytes, never a mix."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_durably(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk: a rename is lost by a power cut until this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """``mkdir -p`` that many ranks can call at once: whoever comes second is content.

    ``os.makedirs(exist_ok=True)`` is not: it asks again whether the folder is there, and a network file system may
    still say no.
    """
    try:
        os.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_folder(path.parent)
        make_folder(path)
