"""Save: every rank writes its own rows; a folder gets its final name only when all of it is on disk.

    rank 0             every rank                  rank 0                                  then
    make step.tmp-X    shard + record, fsync  -->  manifest, COMPLETE, fsync, rename  -->  `latest`, and only now prune
                                         all agree                               all agree

A process killed anywhere leaves either the old checkpoints and a ``.tmp-`` folder, which the next save removes, or
the new checkpoint complete.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_recipes.checkpoint import folder
from moe_recipes.checkpoint.agreement import Agreement
from moe_recipes.checkpoint.entry import Entry
from moe_recipes.checkpoint.manifest import (
    COMPLETE,
    MANIFEST,
    RANK_PREFIX,
    RANK_TENSORS_LOADED,
    Piece,
    RankRecord,
    SavedFile,
    SavedTensor,
    complete_marker,
    merge_records,
    plain_json,
    record_name,
    shard_name,
)
from moe_recipes.runtime import safetensors_file
from moe_recipes.runtime.files import make_folder, replace_durably, sync_folder, write_durably

VISIBLE_WITHIN_S = 60.0
"""How long a file that another node has written may stay unseen on a network file system."""


def save_checkpoint(
    ckpt_dir: Path,
    step: int,
    *,
    entries: Mapping[str, Entry],
    rank_tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    rank: int,
    num_ranks: int,
    barrier: Callable[[], None],
    agree: Callable[[bool], bool],
) -> Path:
    """Save one step and return its folder, the same on every rank. Collective.

    Host memory: one chunk of ``safetensors_file.CHUNK_BYTES`` a rank. Of replicas only ``rows.primary`` is written.

    Args:
        entries: sharded tensors by global name; the same names on every rank.
        rank_tensors: tensors of this rank alone (states of random number generators).
        state: JSON values, the same on all ranks; comes back from ``load_checkpoint``.
        identity: JSON values that must be the same when the checkpoint is loaded.
        barrier: returns when all ranks are there.
        agree: the logical AND over all ranks, through the CPU group.
    Raises:
        CannotWriteError: on every rank; names the first rank that failed, the file and the reason. What was
            written is removed, older checkpoints are untouched.
        InfrastructureError: another rank failed otherwise; that rank raises its own error.
        ValueError: an entry contradicts itself, or no rank or two ranks hold a row.
        TypeError: state or identity is not JSON.
    """
    if RANK_TENSORS_LOADED in state:
        raise ValueError(f"the state of a checkpoint cannot hold {RANK_TENSORS_LOADED!r}: loading sets it")
    state, identity = plain_json("state", state), plain_json("identity", identity)
    together = Agreement(agree=agree, rank=rank, num_ranks=num_ranks)
    is_main = rank == 0
    token = together.share_int(secrets.randbits(24), speaker=is_main, bits=24)
    final = ckpt_dir / folder.step_name(step)
    working = final.with_name(f"{final.name}.tmp-{token:06x}")

    def undo() -> None:
        if is_main:
            shutil.rmtree(working, ignore_errors=True)
        barrier()

    together.act(lambda: _begin(ckpt_dir, working) if is_main else None, undo=undo)
    together.act(lambda: _write_rank(working, rank, entries, rank_tensors), undo=undo)
    together.act(lambda: _commit(working, final, num_ranks, state, identity) if is_main else None, undo=undo)
    return final


def _begin(ckpt_dir: Path, working: Path) -> None:
    with naming(ckpt_dir):
        make_folder(ckpt_dir)
        folder.tidy(ckpt_dir)
    with naming(working):
        make_folder(working)
        sync_folder(ckpt_dir)


def _write_rank(
    working: Path, rank: int, entries: Mapping[str, Entry], rank_tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write this rank's shard and record."""
    written: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        entry.check(name)
        if name.startswith(RANK_PREFIX):
            raise ValueError(f"the name {name!r} begins with {RANK_PREFIX!r}, which is kept for tensors of one rank")
        if entry.rows.primary and entry.rows.count:
            written[name] = entry.tensor
    own = {RANK_PREFIX + name: tensor for name, tensor in rank_tensors.items()}
    shard = working / shard_name(rank)
    with naming(shard):
        crcs = safetensors_file.write_tensors(shard, {**written, **own})
    with open(shard, "rb") as file:
        header = safetensors_file.read_layout(file.fileno()).header
    record = RankRecord(
        shard=SavedFile(name=shard.name, num_bytes=shard.stat().st_size, crc32=zlib.crc32(header)),
        tensors={name: _describe(rank, entry, crcs.get(name)) for name, entry in entries.items() if entry.rows.primary},
        rank_tensors={
            name: _describe_own(rank, tensor, crcs[RANK_PREFIX + name]) for name, tensor in rank_tensors.items()
        },
    )
    with naming(working / record_name(rank)):
        write_durably(working / record_name(rank), record.to_json())


def _describe(rank: int, entry: Entry, crc: int | None) -> SavedTensor:
    shape, rows = tuple(entry.tensor.shape), entry.rows
    piece = Piece(shard=rank, start=rows.start, rows=rows.count, crc32=crc or 0, shape=shape)
    return SavedTensor(
        dtype=safetensors_file.DTYPE_NAMES[entry.tensor.dtype],
        shape=rows.shape,
        opaque=entry.opaque,
        pieces=() if crc is None else (piece,),
    )


def _describe_own(rank: int, tensor: torch.Tensor, crc: int) -> SavedTensor:
    shape = tuple(tensor.shape)
    piece = Piece(shard=rank, start=0, rows=shape[0] if shape else 1, crc32=crc, shape=shape)
    dtype = safetensors_file.DTYPE_NAMES[tensor.dtype]
    return SavedTensor(dtype=dtype, shape=shape, opaque=False, pieces=(piece,))


def _commit(working: Path, final: Path, num_ranks: int, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Merge the records, mark the folder complete, give it its name, and point ``latest`` at it. Rank 0 only."""
    raw = [_read_when_visible(working / record_name(rank)) for rank in range(num_ranks)]
    records = [(RankRecord.from_json(data), data) for data in raw]
    manifest = merge_records(records, step=folder.step_of(final), identity=identity, state=state).to_json()
    with naming(working / MANIFEST):
        write_durably(working / MANIFEST, manifest)
    with naming(working / COMPLETE):
        sync_folder(working)
        write_durably(working / COMPLETE, complete_marker(manifest))
        sync_folder(working)
    with naming(final):
        folder.put_in_place(working, final)
    with naming(final.parent / folder.LATEST):
        replace_durably(final.parent / folder.LATEST, f"{final.name}\n".encode())
    folder.tidy(final.parent)


def _read_when_visible(path: Path) -> bytes:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while True:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` that knows no file (a write, an fsync) the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
