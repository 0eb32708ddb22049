"""Load: every rank reads just the rows that it holds now, at any layout and any number of ranks."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.checkpoint.manifest import (
    RANK_PREFIX,
    RANK_TENSORS_LOADED,
    Manifest,
    Piece,
    SavedFile,
    SavedTensor,
    plain_json,
    read_manifest,
)
from moe_recipes.checkpoint.trusted import check_folder, open_trusted, size_of
from moe_recipes.config.errors import CorruptCheckpointError, RecipeError
from moe_recipes.runtime import safetensors_file
from moe_recipes.runtime.safetensors_file import DTYPE_NAMES, FileLayout

NAMES_SHOWN = 3

log = logging.getLogger(__name__)


def load_checkpoint(
    path: Path,
    *,
    entries: Mapping[str, Entry],
    rank_tensors: Mapping[str, torch.Tensor],
    identity: Mapping[str, Any],
    rank: int,
    num_ranks: int,
    part: str = "",
) -> dict[str, Any]:
    """Fill the tensors in place; return the saved state and, under ``rank_tensors_loaded``, whether
    ``rank_tensors`` were filled too (only if the number of ranks is that of the save).

    Everything that can be checked without reading tensors is checked before the first of them changes. Bytes that
    are read as a whole piece, as on an unchanged layout, are compared with their CRC. Not collective: a rank that
    raises does so alone.

    Args:
        part: load only the tensors whose names start so, and compare only the identity values that are given.

    Raises:
        CorruptCheckpointError: a file is missing, short or damaged; names it.
        RecipeError: names, shapes, dtypes or the identity differ from what was saved; or the layout differs and an
            opaque entry cannot be cut.
        EnvironmentMismatchError: another version of the format.
    """
    check_folder(path)
    manifest = read_manifest(path)
    saved_identity = {key: value for key, value in manifest.identity.items() if not part or key in identity}
    _check_identity(path, saved_identity, plain_json("identity", identity))
    _check_names(path, entries.keys(), {name for name in manifest.tensors if name.startswith(part)})
    reads = [read for name, entry in entries.items() for read in _plan(path, name, entry, manifest.tensors[name])]
    own, loads_own = ([], False) if part else _plan_own(manifest, rank_tensors, rank, num_ranks)
    reads += own
    by_shard: dict[int, list[Read]] = {}
    for read in reads:
        by_shard.setdefault(read.piece.shard, []).append(read)
    for shard in by_shard:
        _check_size(path, manifest.shards[shard])
    for shard, its_reads in sorted(by_shard.items()):
        with _open_shard(path, manifest.shards[shard]) as (fd, layout):
            for read in its_reads:
                _fill(path / manifest.shards[shard].name, fd, layout, read)
    return {**manifest.state, RANK_TENSORS_LOADED: loads_own}


@dataclass(frozen=True, kw_only=True)
class Read:
    """Rows ``first_row ...`` of one stored piece, into ``out``."""

    name: str
    piece: Piece
    first_row: int
    out: torch.Tensor


def _plan(path: Path, name: str, entry: Entry, saved: SavedTensor) -> Iterator[Read]:
    entry.check(name)
    rows, dtype = entry.rows, DTYPE_NAMES.get(entry.tensor.dtype)
    if (dtype, rows.shape, entry.opaque) != (saved.dtype, saved.shape, saved.opaque):
        raise RecipeError(
            f"{path}: tensor {name!r} was saved as {_kind(saved.dtype, saved.shape, saved.opaque)}, the model wants"
            f" {_kind(dtype, rows.shape, entry.opaque)}; resume with the model and optimizer of the run that saved it"
        )
    if entry.opaque:
        yield from _plan_opaque(path, name, entry, saved)
        return
    end = rows.start + rows.count
    for piece in saved.pieces:
        first, last = max(piece.start, rows.start), min(piece.start + piece.rows, end)
        if first < last:
            out = entry.tensor.detach()
            out = out[first - rows.start : last - rows.start] if rows.shape else out
            yield Read(name=name, piece=piece, first_row=first - piece.start, out=out)


def _plan_opaque(path: Path, name: str, entry: Entry, saved: SavedTensor) -> Iterator[Read]:
    rows = entry.rows
    if rows.count == 0:
        return
    same = [piece for piece in saved.pieces if (piece.start, piece.rows) == (rows.start, rows.count)]
    if not same:
        raise RecipeError(
            f"{path}: {name!r} is quantised optimizer state and cannot be cut anew: no rank saved just the rows"
            f" {rows.start}..{rows.start + rows.count}; resume with the parallel.fsdp_size and ep_size of the save"
        )
    if same[0].shape != tuple(entry.tensor.shape):
        raise RecipeError(
            f"{path}: {name!r} was saved with local shape {list(same[0].shape)}, the optimizer wants"
            f" {list(entry.tensor.shape)}; resume with the optimizer of the run that saved it"
        )
    yield Read(name=name, piece=same[0], first_row=0, out=entry.tensor.detach())


def _plan_own(
    manifest: Manifest, rank_tensors: Mapping[str, torch.Tensor], rank: int, num_ranks: int
) -> tuple[list[Read], bool]:
    """Reads of this rank's own tensors, and whether they are to be filled."""
    if manifest.num_ranks != num_ranks:
        return [], False
    saved = manifest.rank_tensors[rank]
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in rank_tensors.items()}
    saved_kinds = {name: (safetensors_file.DTYPES[tensor.dtype], tensor.shape) for name, tensor in saved.items()}
    if kinds != saved_kinds:
        log.warning("rank %d keeps its own tensors: saved were %s, wanted are %s", rank, saved_kinds, kinds)
        return [], False
    reads = [
        Read(name=RANK_PREFIX + name, piece=saved[name].pieces[0], first_row=0, out=tensor)
        for name, tensor in rank_tensors.items()
    ]
    return reads, True


def _fill(file: Path, fd: int, layout: FileLayout, read: Read) -> None:
    place = layout.places.get(read.name)
    if place is None or place.shape != read.piece.shape or place.dtype != read.out.dtype:
        raise CorruptCheckpointError(f"{file}: tensor {read.name!r} is not there as the manifest says")
    try:
        crc = safetensors_file.read_rows(fd, layout, read.name, read.first_row, read.out)
    except (ValueError, OSError) as error:
        raise CorruptCheckpointError(f"{file}: tensor {read.name!r}: {error}") from error
    whole = read.out.numel() == math.prod(read.piece.shape)
    if whole and crc != read.piece.crc32:
        raise CorruptCheckpointError(f"{file}: the bytes of tensor {read.name!r} have changed since the save (CRC)")


@contextmanager
def _open_shard(path: Path, file: SavedFile) -> Iterator[tuple[int, FileLayout]]:
    fd = open_trusted(path / file.name)
    try:
        try:
            layout = safetensors_file.read_layout(fd)
        except ValueError as error:
            raise CorruptCheckpointError(f"{path / file.name}: {error}") from error
        if zlib.crc32(layout.header) != file.crc32:
            raise CorruptCheckpointError(f"{path / file.name}: its header has changed since the save (CRC)")
        yield fd, layout
    finally:
        os.close(fd)


def _check_size(path: Path, file: SavedFile) -> None:
    num_bytes = size_of(path / file.name)
    if num_bytes != file.num_bytes:
        raise CorruptCheckpointError(f"{path / file.name}: {num_bytes} bytes instead of {file.num_bytes}")


def _check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = [
        f"{key} was {saved.get(key, '(not set)')!r}, is {wanted.get(key, '(not set)')!r}"
        for key in sorted(saved.keys() | wanted.keys())
        if key not in saved or key not in wanted or saved[key] != wanted[key]
    ]
    if differences:
        raise RecipeError(
            f"{path} belongs to another run: {'; '.join(differences)}; restore the value or use another run_dir"
        )


def _check_names(path: Path, wanted: Set[str], saved: Set[str]) -> None:
    missing, unexpected = sorted(wanted - saved), sorted(saved - wanted)
    if missing or unexpected:
        raise RecipeError(
            f"{path} holds other tensors than the model: {len(missing)} missing{_few(missing)},"
            f" {len(unexpected)} unexpected{_few(unexpected)}; resume with the model and optimizer that were saved"
        )


def _few(names: list[str]) -> str:
    return f" ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})" if names else ""


def _kind(dtype: str | None, shape: tuple[int, ...], opaque: bool) -> str:
    return f"{'quantised ' if opaque else ''}{dtype} {list(shape)}"
