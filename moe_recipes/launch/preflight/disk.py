"""The file system of the checkpoints, as every node sees it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import EXIT_CANNOT_WRITE
from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.preflight.probe import Probe, at_least, failed, not_available, passed
from moe_recipes.plan.parameters import count_parameters
from moe_recipes.plan.states import checkpoint_bytes, export_bytes

TEST_BYTES = 64 * 2**20
WAIT_FOR_PEER_S = 50.0
"""Containers do not start at the same moment on all nodes, and a loaded file system takes a while for an fsync."""

FILES_A_RANK = 4
"""Files that one rank writes into a checkpoint, at most: its shard, its records, and their temporaries."""


def checkpoint_folder(run_dir: Path) -> Path:
    """A folder on the file system of the checkpoints: where ``ckpt`` leads if it is there, else the run folder."""
    ckpt = RunFolder(run_dir).ckpt
    return ckpt.resolve() if ckpt.is_dir() else run_dir


def payload(nonce: str, node: str, num_bytes: int = TEST_BYTES) -> bytes:
    """Bytes that any node can make again for a node's name, and that do not compress."""
    block = hashlib.shake_256(f"{nonce} {node}".encode()).digest(2**20)
    return (block * (num_bytes // len(block) + 1))[:num_bytes]


def payload_file(folder: Path, node: str) -> Path:
    return folder / f"{node}.bin"


def write_probe(
    folder: Path, *, node: str, nonce: str, floor_gb_per_s: float | None = None, num_bytes: int = TEST_BYTES
) -> Probe:
    """Write, fsync and rename a file as a checkpoint does; the value is GB/s (1e9 bytes) up to the end of fsync."""
    data, path = memoryview(payload(nonce, node, num_bytes)), payload_file(folder, node)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with temporary.open("wb", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        seconds = time.monotonic() - start
        temporary.replace(path)
    except OSError as error:
        mend = "mount the file system for writing on this node, or free space"
        place = error.filename or folder
        return failed(f"{place}: cannot be written: {error.strerror}; {mend}", exit_code=EXIT_CANNOT_WRITE)
    value = round(num_bytes / seconds / 1e9, 3)
    if floor_gb_per_s is None:
        return passed(value)
    return at_least(value, floor_gb_per_s, "one node writes slower than the cluster file's floor, in GB/s")


def read_back_probe(
    folder: Path, *, peer: str, nonce: str, num_bytes: int = TEST_BYTES, wait_s: float = WAIT_FOR_PEER_S
) -> Probe:
    """Read what another node wrote, byte for byte, as soon as it is there."""
    path = payload_file(folder, peer)
    deadline = time.monotonic() + wait_s
    while not path.is_file():
        if time.monotonic() > deadline:
            return failed(
                f"{path}: not seen here within {wait_s:g} s; {peer} wrote none, or this node has another file system"
                " mounted there"
            )
        time.sleep(0.1)
        # A network file system may go on saying "not there" until the folder is read again. The folder itself may come
        # late: all probes run side by side, and this node's own writer may not have made it yet.
        with suppress(FileNotFoundError):
            os.listdir(folder)
    if path.read_bytes() != payload(nonce, peer, num_bytes):
        return failed(f"{path}: reads other bytes than {peer} wrote; do not save checkpoints on this file system")
    return passed(num_bytes, message=f"written by {peer}")


def needed_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int | None:
    """Bytes of (``keep_last`` + 1) checkpoints and of the export if there is to be one; None where the family's
    parameters, or the optimizer's bytes, are not counted."""
    count = count_parameters(config)
    one = checkpoint_bytes(count, recipe) if count is not None else None
    if count is None or one is None:
        return None
    return (recipe.checkpoint.keep_last + 1) * one + (export_bytes(count, recipe) if recipe.checkpoint.export else 0)


def space_probe(folder: Path, recipe: Recipe) -> Probe:
    """Free bytes for (``keep_last`` + 1) checkpoints and the export: a new one is whole before an old one goes."""
    config, _, _ = read_model_config(recipe.model)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    needed = needed_bytes(recipe, config)
    if needed is None:
        return not_available(
            f"bytes of {config.get('model_type')!r} with {recipe.optim.name} are not counted", value=free
        )
    kept = recipe.checkpoint.keep_last + 1
    if free >= needed:
        return passed(free, floor=needed)
    return failed(
        f"{folder}: {free / 1e12:.3f} TB free, {needed / 1e12:.3f} TB needed for {kept} checkpoints"
        f"{' and the export' if recipe.checkpoint.export else ''}; free space, lower checkpoint.keep_last, or set"
        " another run_dir",
        value=free,
        floor=needed,
        exit_code=EXIT_CANNOT_WRITE,
    )


def inodes_probe(folder: Path, recipe: Recipe) -> Probe:
    """Free inodes for the files of the same checkpoints."""
    status = os.statvfs(folder)
    if status.f_files == 0:
        return not_available("this file system has no limit of inodes, or does not tell it")
    needed = (recipe.checkpoint.keep_last + 2) * FILES_A_RANK * recipe.parallel.num_ranks
    free = status.f_favail
    if free >= needed:
        return passed(free, floor=needed)
    mend = "remove files, or set another run_dir"
    return failed(f"{folder}: too few free inodes; {mend}", value=free, floor=needed, exit_code=EXIT_CANNOT_WRITE)
