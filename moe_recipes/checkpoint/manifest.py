"""What a checkpoint holds, as JSON: ``manifest.json`` says which file has which rows of every tensor.

    ckpt/latest                         text: the folder to resume from
    ckpt/step-00000200/
        rank-00003.safetensors          the rows that rank 3 wrote, and its own tensors under ``rank:NAME``
        rank-00003.json                 the same as a list, with sizes and CRCs; merged into the manifest
        manifest.json                   every tensor of every rank, the state, the identity
        COMPLETE                        size and CRC of the manifest; written last

CRC-32 finds every flipped byte and costs 0.3 to 0.8 s a GiB; it does not stop a forger.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_recipes.checkpoint.trusted import read_trusted
from moe_recipes.config.errors import CorruptCheckpointError, EnvironmentMismatchError
from moe_recipes.runtime.safetensors_header import ITEM_BYTES

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
RANK_PREFIX = "rank:"
RANK_TENSORS_LOADED = "rank_tensors_loaded"
VALIDATION_LOSS = "validation_loss"
"""Key of the state, where the loss over the held-out batches was measured at the step that is saved."""

MAX_MARKER_BYTES, MAX_MANIFEST_BYTES = 4096, 1 << 32
MAX_TENSOR_BYTES = 1 << 50
SHARD_NAME = re.compile(r"rank-\d{5,}\.safetensors")
RECORD_NAME = re.compile(r"rank-\d{5,}\.json")


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def record_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    name: str
    num_bytes: int
    crc32: int
    """Of the header for a shard, of the whole file for a record."""


class Piece(NamedTuple):
    """Rows ``start .. start + rows`` of a tensor, in the shard of rank ``shard``.

    A tuple because there are many, a million with 128 ranks: three times as fast to make as a frozen dataclass.
    """

    shard: int
    start: int
    rows: int
    crc32: int
    shape: tuple[int, ...]
    """Of what is stored: ``rows`` rows, or any shape for an opaque tensor."""


class SavedTensor(NamedTuple):
    dtype: str
    """Name in safetensors."""

    shape: tuple[int, ...]
    """Global shape."""

    opaque: bool
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def gap(self) -> str | None:
        """Rows that no piece holds, or that two hold; None if every row is there once."""
        end = 0
        for piece in sorted(self.pieces, key=lambda piece: piece.start):
            if piece.start != end:
                return f"rows {min(end, piece.start)}..{max(end, piece.start)} are saved {_times(piece.start < end)}"
            end += piece.rows
        return None if end == self.num_rows else f"rows {end}..{self.num_rows} are saved {_times(end > self.num_rows)}"


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank wrote."""

    shard: SavedFile
    tensors: Mapping[str, SavedTensor]
    """One piece each."""

    rank_tensors: Mapping[str, SavedTensor]

    def to_json(self) -> bytes:
        return _dump(
            {
                "shard": asdict(self.shard),
                "tensors": {name: _short(tensor) for name, tensor in self.tensors.items()},
                "rank_tensors": {name: _short(tensor) for name, tensor in self.rank_tensors.items()},
            }
        )

    @classmethod
    def from_json(cls, raw: bytes) -> RankRecord:
        record = json.loads(raw)
        return cls(
            shard=SavedFile(**record["shard"]),
            tensors={name: _long(spec) for name, spec in record["tensors"].items()},
            rank_tensors={name: _long(spec) for name, spec in record["rank_tensors"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    step: int
    num_ranks: int
    identity: Mapping[str, Any]
    state: Mapping[str, Any]
    shards: Sequence[SavedFile]
    records: Sequence[SavedFile]
    tensors: Mapping[str, SavedTensor]
    rank_tensors: Sequence[Mapping[str, SavedTensor]]
    """By rank."""

    def to_json(self) -> bytes:
        """Pieces as short lists: with 128 ranks and 6000 tensors they are nearly all of the file."""
        return _dump(
            {
                "format_version": FORMAT_VERSION,
                **{key: getattr(self, key) for key in ("step", "num_ranks", "identity", "state")},
                "shards": [asdict(file) for file in self.shards],
                "records": [asdict(file) for file in self.records],
                "tensors": {name: _short(tensor) for name, tensor in self.tensors.items()},
                "rank_tensors": [{name: _short(t) for name, t in own.items()} for own in self.rank_tensors],
            }
        )


def merge_records(
    records: Sequence[tuple[RankRecord, bytes]], *, step: int, identity: Mapping[str, Any], state: Mapping[str, Any]
) -> Manifest:
    """One manifest of what all ranks wrote. ``records`` are in rank order, each with its bytes on disk.

    Raises:
        ValueError: ranks disagree about a tensor, or a row of a tensor was written by no rank or by two.
    """
    first: dict[str, SavedTensor] = {}
    pieces: dict[str, list[Piece]] = {}
    for record, _ in records:
        for name, part in record.tensors.items():
            known = first.setdefault(name, part)
            if known[:3] != part[:3]:
                raise ValueError(f"ranks disagree about tensor {name!r}: {known[:3]} and {part[:3]}")
            pieces.setdefault(name, []).extend(part.pieces)
    tensors = {name: known._replace(pieces=tuple(pieces[name])) for name, known in first.items()}
    for name, tensor in tensors.items():
        if gap := tensor.gap():
            raise ValueError(f"tensor {name!r} of shape {list(tensor.shape)}: {gap}")
    return Manifest(
        step=step,
        num_ranks=len(records),
        identity=identity,
        state=state,
        shards=[record.shard for record, _ in records],
        records=[
            SavedFile(name=record_name(rank), num_bytes=len(raw), crc32=zlib.crc32(raw))
            for rank, (_, raw) in enumerate(records)
        ],
        tensors=tensors,
        rank_tensors=[record.rank_tensors for record, _ in records],
    )


def plain_json(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` after a round trip through JSON (tuples become lists); a TypeError that says ``what`` if it cannot."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(value))
        return plain
    except TypeError as error:
        raise TypeError(f"the {what} of a checkpoint must be JSON: {error}") from error


def complete_marker(manifest: bytes) -> bytes:
    return _dump({"manifest_bytes": len(manifest), "manifest_crc32": zlib.crc32(manifest)})


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        CorruptCheckpointError: COMPLETE or the manifest is missing or damaged; names the file.
        EnvironmentMismatchError: another version of the format.
    """
    marker = read_trusted(path / COMPLETE, max_bytes=MAX_MARKER_BYTES)
    raw = read_trusted(path / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    try:
        expected = json.loads(marker)
        if (expected["manifest_bytes"], expected["manifest_crc32"]) != (len(raw), zlib.crc32(raw)):
            raise CorruptCheckpointError(f"{path / MANIFEST}: its bytes are not those that COMPLETE vouches for")
        return _parse(json.loads(raw))
    except EnvironmentMismatchError as error:
        raise EnvironmentMismatchError(f"{path / MANIFEST}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: COMPLETE or {MANIFEST} is damaged: {error!r}") from error


def _parse(raw: Any) -> Manifest:
    if raw["format_version"] != FORMAT_VERSION:
        raise EnvironmentMismatchError(
            f"checkpoint format {raw['format_version']}, this version reads {FORMAT_VERSION};"
            f" resume with the version of moe-recipes that wrote it"
        )
    shards, records = ([SavedFile(**file) for file in raw[key]] for key in ("shards", "records"))
    for pattern, files in ((SHARD_NAME, shards), (RECORD_NAME, records)):
        for file in files:
            if not pattern.fullmatch(file.name):
                raise ValueError(f"{file.name!r} is no file name of a checkpoint")
    manifest = Manifest(
        step=raw["step"],
        num_ranks=raw["num_ranks"],
        identity=raw["identity"],
        state=raw["state"],
        shards=shards,
        records=records,
        tensors={name: _long(spec) for name, spec in raw["tensors"].items()},
        rank_tensors=[{name: _long(spec) for name, spec in own.items()} for own in raw["rank_tensors"]],
    )
    if not manifest.num_ranks == len(shards) == len(records) == len(manifest.rank_tensors):
        raise ValueError(f"{manifest.num_ranks} ranks, {len(shards)} shards")
    for own in manifest.rank_tensors:
        for name, tensor in own.items():
            _check_sizes(name, tensor)
    for name, tensor in manifest.tensors.items():
        _check_sizes(name, tensor)
        if gap := tensor.gap():
            raise ValueError(f"tensor {name!r}: {gap}")
        if any(not 0 <= piece.shard < len(shards) for piece in tensor.pieces):
            raise ValueError(f"tensor {name!r} lies in a shard that is not listed")
    return manifest


def _check_sizes(name: str, tensor: SavedTensor) -> None:
    """Refuse shapes that no file can hold, before anything is allocated for them."""
    item_bytes = ITEM_BYTES[tensor.dtype]
    # Pieces have shapes of their own only where they are opaque; else ``gap`` holds them to the rows of the whole.
    own = [piece.shape for piece in tensor.pieces] if tensor.opaque else []
    for shape in (tensor.shape, *own):
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"tensor {name!r} has the shape {list(shape)}")
        if math.prod(shape) * item_bytes > MAX_TENSOR_BYTES:
            raise ValueError(f"tensor {name!r} of shape {list(shape)} would have {math.prod(shape) * item_bytes} bytes")


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _times(twice: bool) -> str:
    return "twice" if twice else "by no rank"


def _short(tensor: SavedTensor) -> dict[str, Any]:
    short: dict[str, Any] = {"dtype": tensor.dtype, "shape": tensor.shape}
    short["pieces"] = [[piece.shard, piece.start, piece.rows, piece.crc32] for piece in tensor.pieces]
    if tensor.opaque:
        short["stored_shapes"] = [piece.shape for piece in tensor.pieces]
    return short


def _long(spec: dict[str, Any]) -> SavedTensor:
    shape = tuple(spec["shape"])
    opaque = "stored_shapes" in spec
    stored = spec.get("stored_shapes") or [(count, *shape[1:]) if shape else () for _, _, count, _ in spec["pieces"]]
    pieces = tuple(
        Piece(shard=shard, start=start, rows=count, crc32=crc, shape=tuple(stored_shape))
        for (shard, start, count, crc), stored_shape in zip(spec["pieces"], stored, strict=True)
    )
    return SavedTensor(dtype=spec["dtype"], shape=shape, opaque=opaque, pieces=pieces)
