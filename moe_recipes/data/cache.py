"""Folders of arrays: written once under a temporary name, renamed when whole, memory-mapped by every rank.

CACHE/tokens-KEY/   one tokenized set of files     CACHE/packed-KEY/   one packing of it
CACHE/opened-KEY.json   which of them a recipe's data settings lead to; the ranks that read no text look here
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_recipes.config.errors import CannotWriteError, DataError, MissingInputError

META = "meta.json"
ABANDONED_AFTER_S = 3600
VISIBLE_AFTER_S = 5.0
"""A shared file system may show another host's file a little late."""


class GrowingArray:
    """A ``.npy`` file with one dimension that is written piece by piece, so that memory does not grow with the data."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._file = open(path, "wb")  # noqa: SIM115  closed by close()
        self._header_bytes = self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        self._file.seek(0)
        if self._write_header() != self._header_bytes:
            raise AssertionError("numpy pads .npy headers so that a growing first dimension fits")
        self._file.close()

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def key_of(*parts: Any) -> str:
    """16 hex digits of the parts, which are JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends well, and is removed otherwise.

    If another run finished the same folder first, its copy stays.

    Raises:
        CannotWriteError: the disk is full or not writable.
    """
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        _remove_abandoned(folder)
        temporary.mkdir(parents=True)
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
    except OSError as error:
        raise CannotWriteError(f"{folder}: {error.strerror}; free space or set data.cache_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left of this folder: parts that nobody wrote to for an hour."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        newest = max((path.stat().st_mtime for path in (left, *left.glob("*"))), default=0.0)
        if time.time() - newest > ABANDONED_AFTER_S:
            shutil.rmtree(left, ignore_errors=True)


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def write_json(path: Path, value: Any) -> None:
    """Write under a temporary name, then rename: readers see the old file or the whole new one.

    Raises:
        CannotWriteError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise CannotWriteError(f"{path}: {error.strerror}; free space or set data.cache_dir") from error


def read_folder(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a folder, memory-mapped, and its ``meta.json``.

    Raises:
        MissingInputError: the folder is not there.
        DataError: an array is missing, cut short, or not as long as ``meta.json`` says.
    """
    if not folder.is_dir():
        raise MissingInputError(f"the token cache {folder} is not there; see the main rank's error, or its log")
    try:
        meta = json.loads((folder / META).read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["lengths"]}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the token cache {folder} is damaged ({error}); delete that folder") from error
    for name, length in meta["lengths"].items():
        if len(arrays[name]) != length:
            held = f"{name} holds {len(arrays[name])} of {length} values"
            raise DataError(f"the token cache {folder} is damaged ({held}); delete that folder")
    return arrays, meta


def read_opened(path: Path) -> dict[str, Any]:
    """What the main rank wrote for the others, waiting a little for it to appear.

    Raises:
        MissingInputError: it is not there, so the main rank failed or writes to another disk.
    """
    give_up = time.monotonic() + VISIBLE_AFTER_S
    while not path.is_file() and time.monotonic() < give_up:
        time.sleep(0.1)
    if not path.is_file():
        raise MissingInputError(
            f"no token cache in {path.parent}: the main rank wrote none; see its error, or set data.cache_dir to a"
            f" folder that all hosts share"
        )
    opened: dict[str, Any] = json.loads(path.read_text())
    return opened
