"""Two checkpoints compared tensor by tensor, whatever the layouts that saved them; a few rows of each at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from moe_recipes.checkpoint.manifest import Manifest, Piece, SavedTensor, read_manifest
from moe_recipes.checkpoint.trusted import check_folder, open_trusted
from moe_recipes.config.errors import CorruptCheckpointError
from moe_recipes.runtime import safetensors_file
from moe_recipes.runtime.safetensors_file import DTYPES, FileLayout
from moe_recipes.runtime.safetensors_header import CHUNK_BYTES

NAMES_SHOWN = 3


class Opened:
    """A checkpoint whose rows can be read by their number in the whole tensor."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        check_folder(path)
        self.path, self.stack = path, stack
        self.manifest: Manifest = read_manifest(path)
        self.shards: dict[int, tuple[int, FileLayout]] = {}

    def fill(self, name: str, first_row: int, out: torch.Tensor) -> None:
        """Rows ``first_row ...`` of a tensor that is not opaque.

        Raises:
            CorruptCheckpointError: a shard is damaged; names it.
        """
        saved = self.manifest.tensors[name]
        rows = out.shape[0] if saved.shape else 1
        for piece in saved.pieces:
            first, last = max(piece.start, first_row), min(piece.start + piece.rows, first_row + rows)
            if first < last:
                part = out[first - first_row : last - first_row] if saved.shape else out
                self.read(name, piece, first - piece.start, part)

    def read(self, name: str, piece: Piece, first_row: int, out: torch.Tensor) -> None:
        fd, layout = self._shard(piece.shard)
        file = self.path / self.manifest.shards[piece.shard].name
        if name not in layout.places:
            raise CorruptCheckpointError(f"{file}: tensor {name!r} is not there as the manifest says")
        try:
            safetensors_file.read_rows(fd, layout, name, first_row, out)
        except (ValueError, OSError) as error:
            raise CorruptCheckpointError(f"{file}: tensor {name!r}: {error}") from error

    def _shard(self, number: int) -> tuple[int, FileLayout]:
        if number not in self.shards:
            file = self.path / self.manifest.shards[number].name
            fd = open_trusted(file)
            self.stack.callback(os.close, fd)
            try:
                self.shards[number] = fd, safetensors_file.read_layout(fd)
            except ValueError as error:
                raise CorruptCheckpointError(f"{file}: {error}") from error
        return self.shards[number]


def kind_of(name: str) -> str:
    """``model`` for weights and buffers, ``optim.exp_avg`` for that moment of all parameters."""
    words = name.split(".")
    return words[0] if words[0] != "optim" else ".".join(words[:2])


def compare(left: Path, right: Path) -> dict[str, Any]:
    """What differs between two checkpoints. Host memory: four chunks of ``CHUNK_BYTES`` and the two manifests.

    Returns:
        ``missing`` (in the right one), ``unexpected`` (only there), ``reshaped`` names; ``identity`` and ``state`` keys
        that differ; and by kind ``tensors``, ``different``, ``max_abs`` (largest absolute difference of two values,
        NaN where one of them is NaN alone) and ``first`` names.
    Raises:
        CorruptCheckpointError: a file of either is missing or damaged.
    """
    with ExitStack() as stack:
        one, two = Opened(left, stack), Opened(right, stack)
        names = one.manifest.tensors.keys() & two.manifest.tensors.keys()
        kinds: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"tensors": 0, "different": 0, "max_abs": 0.0, "first": []}
        )
        reshaped = []
        for name in sorted(names):
            saved, other = one.manifest.tensors[name], two.manifest.tensors[name]
            if saved[:3] != other[:3]:
                reshaped.append(name)
                continue
            found = kinds[kind_of(name)]
            found["tensors"] += 1
            same, largest = _difference(one, two, name, saved, other)
            if not same:
                found["different"] += 1
                found["max_abs"] = max(found["max_abs"], largest) if largest == largest else largest
                found["first"] = [*found["first"], name][:NAMES_SHOWN]
        return {
            "left": str(left),
            "right": str(right),
            "missing": sorted(one.manifest.tensors.keys() - names),
            "unexpected": sorted(two.manifest.tensors.keys() - names),
            "reshaped": reshaped,
            "identity": _keys_that_differ(one.manifest.identity, two.manifest.identity),
            "state": _keys_that_differ(one.manifest.state, two.manifest.state),
            "kinds": dict(kinds),
        }


def _keys_that_differ(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = sorted(left.keys() | right.keys())
    return {key: [left.get(key), right.get(key)] for key in keys if left.get(key) != right.get(key)}


def _difference(one: Opened, two: Opened, name: str, saved: SavedTensor, other: SavedTensor) -> tuple[bool, float]:
    """``(equal in every bit, largest absolute difference)``."""
    same, largest = True, 0.0
    pairs = _opaque_pairs(one, two, name, saved, other) if saved.opaque else _row_pairs(one, two, name, saved)
    for left, right in pairs:
        if left.shape != right.shape:
            return False, float("nan")
        if not torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)):
            same = False
            wide = torch.complex128 if left.is_complex() else torch.float64
            found = float((left.to(wide) - right.to(wide)).abs().max())
            largest = max(largest, found) if found == found else found
    return same, largest


def _row_pairs(one: Opened, two: Opened, name: str, saved: SavedTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    dtype = DTYPES[saved.dtype]
    columns = saved.shape[1:]
    row_bytes = max(1, torch.Size(columns).numel() * dtype.itemsize)
    step = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, saved.num_rows, step):
        shape = (min(step, saved.num_rows - first), *columns) if saved.shape else ()
        left, right = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        if left.numel():
            one.fill(name, first, left)
            two.fill(name, first, right)
            yield left, right


def _opaque_pairs(
    one: Opened, two: Opened, name: str, saved: SavedTensor, other: SavedTensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Quantised state compares piece by piece; where ranks cut it otherwise it cannot be compared at all."""
    dtype = DTYPES[saved.dtype]
    pieces = {(piece.start, piece.rows): piece for piece in other.pieces}
    for piece in saved.pieces:
        match = pieces.get((piece.start, piece.rows))
        left = torch.empty(piece.shape, dtype=dtype)
        right = torch.empty(match.shape if match else (0,), dtype=dtype)
        one.read(name, piece, 0, left)
        if match is not None:
            two.read(name, match, 0, right)
        yield left, right


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"left      {report['left']}", f"right     {report['right']}"]
    for key, what in (("missing", "only left"), ("unexpected", "only right"), ("reshaped", "other shape or dtype")):
        if names := report[key]:
            lines.append(f"{key:<10}{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}")
    for key in ("identity", "state"):
        lines += [f"{key:<10}{name}: {old!r} -> {new!r}" for name, (old, new) in report[key].items()]
    lines.append(f"{'kind':<22} {'tensors':>8} {'differ':>8} {'max abs':>12}  first")
    for kind, found in sorted(report["kinds"].items()):
        lines.append(
            f"{kind:<22} {found['tensors']:>8} {found['different']:>8} {found['max_abs']:>12.4e}"
            f"  {', '.join(found['first'])}".rstrip()
        )
    return lines
