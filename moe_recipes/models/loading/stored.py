"""One tensor as it is stored, and its values: as it is, as FP8 codes with block scales, or as MXFP4 codes.

    plain   X                                     values of any float dtype, cast to the parameter's
    fp8     X [R, C], X_scale_inv [r, c]          code * scale in float32, then cast; a scale serves a block, of which
                                                  a rank's rows may hold a part
    mxfp4   X_blocks [E, O, G, 16] uint8,         two 4-bit codes a byte, low half first, times 2^(scale - 127); the
            X_scales [E, O, G] uint8              values are stored transposed: the tensor is [E, 32 G, O]

Everything is read in windows of at most ``WINDOW_BYTES``. What a window's values need beside it stays below that size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_recipes.config.errors import CorruptCheckpointError
from moe_recipes.models.loading.files import WeightFiles, unreadable
from moe_recipes.runtime.safetensors_file import Place, read_at

WINDOW_BYTES = 64 * 2**20
"""Bytes that are read at once. Host memory of a load, beside the weights that live there, stays below twice this."""

CODE_WINDOW_BYTES = 4 * 2**20
"""The same for codes: in float32 their values take 4 (FP8) or 8 (MXFP4) times as much."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FP8_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_GROUP = 32
"""Values that share a scale."""

_DIMENSIONS = {"fp8": (2, 3), "mxfp4": (3,)}
_CODES = {"fp8": (FP8_CODES, (*FLOATS, torch.float8_e8m0fnu, torch.uint8)), "mxfp4": ((torch.uint8,), (torch.uint8,))}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What config.json says of a quantised source."""

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (128, 128)
    """Rows and columns of an FP8 scale's block."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of the family's key layout, and the keys that hold it."""

    key: str
    kind: Literal["plain", "fp8", "mxfp4"]
    keys: tuple[str, ...]
    """The tensor; or codes and scales."""


def find_stored(files: WeightFiles, key: str, quantization: Quantization | None) -> Stored | None:
    """How the source holds ``key``; None if it does not."""
    here = files.weight_map
    if key in here:
        scales = f"{key}_scale_inv"
        if quantization is not None and quantization.method == "fp8" and scales in here:
            return Stored(key=key, kind="fp8", keys=(key, scales))
        return Stored(key=key, kind="plain", keys=(key,))
    codes = f"{key}_blocks", f"{key}_scales"
    if quantization is not None and quantization.method == "mxfp4" and all(name in here for name in codes):
        return Stored(key=key, kind="mxfp4", keys=codes)
    return None


def stored_shapes(stored: Stored, shape: Sequence[int], block: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes that the stored keys should have for a tensor of ``shape``."""
    if stored.kind == "mxfp4":
        experts, wide, out = shape
        groups = (experts, out, wide // MXFP4_GROUP)
        return [(*groups, MXFP4_GROUP // 2), groups]
    if stored.kind == "fp8":
        *before, rows, columns = shape
        return [tuple(shape), (*before, math.ceil(rows / block[0]), math.ceil(columns / block[1]))]
    return [tuple(shape)]


def stored_rows(stored: Stored, shape: Sequence[int], start: int, end: int, block_rows: int) -> list[tuple[int, int]]:
    """The rows of each stored key that the rows ``start`` to ``end`` (not included) of the tensor need."""
    if stored.kind == "fp8" and len(shape) == 2:
        return [(start, end), (start // block_rows, math.ceil(end / block_rows))]
    return [(start, end)] * len(stored.keys)


class Reader:
    """Reads stored tensors into parts of parameters on one device, window by window.

    Args:
        files: open while the reader is used.
        device: where the targets live.
    """

    def __init__(self, files: WeightFiles, device: torch.device, quantization: Quantization | None) -> None:
        self.files, self.device = files, device
        self.block = quantization.block if quantization is not None else (128, 128)
        self.num_bytes = 0
        """Bytes read so far."""

        self._window: Tensor | None = None

    def check(self, stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """The stored tensor has the model's shape, and a dtype that the parameter can take. Reads headers only.

        Raises:
            MissingInputError, CorruptCheckpointError: it has not, with file and key.
        """
        places = [self.files.place(key) for key in stored.keys]
        path = self.files.folder / self.files.weight_map[stored.keys[0]]
        known = len(shape) in _DIMENSIONS[stored.kind] if stored.kind != "plain" else True
        wanted = stored_shapes(stored, shape, self.block) if known else [tuple(shape)] * 2
        if stored.kind == "fp8" and known and places[0].shape == wanted[0]:
            self._fp8_block(stored, places, shape)
            wanted[1] = places[1].shape
        for key, place, want in zip(stored.keys, places, wanted, strict=True):
            if place.shape != want:
                raise CorruptCheckpointError(
                    f"{path}: {key} has another shape than in the model: {list(place.shape)}, not {list(want)}; fetch"
                    " the model again, or the config.json that belongs to its weights"
                )
        if stored.kind != "plain":
            fits = all(place.dtype in known for place, known in zip(places, _CODES[stored.kind], strict=True))
        else:
            fits = places[0].dtype in FLOATS if dtype in FLOATS else places[0].dtype == dtype
        if not fits:
            found = ", ".join(str(place.dtype).removeprefix("torch.") for place in places)
            mend = "its config.json has no quantization_config, or " if places[0].dtype in FP8_CODES else ""
            raise CorruptCheckpointError(
                f"{path}: {stored.keys[0]} is {found}, which cannot become {str(dtype).removeprefix('torch.')}:"
                f" {mend}the file is not of this model; fetch it again"
            )

    def _fp8_block(self, stored: Stored, places: list[Place], shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a block: the config's where the scales have that many, else as they divide the tensor."""
        grid = places[1].shape[-2:] if len(places[1].shape) >= 2 else (1, 1)
        rows, columns = shape[-2:]
        if grid == tuple(math.ceil(size / block) for size, block in zip((rows, columns), self.block, strict=True)):
            return self.block
        if all(grid) and rows % grid[0] == 0 and columns % grid[1] == 0 and places[1].shape[:-2] == tuple(shape[:-2]):
            return rows // grid[0], columns // grid[1]
        path = self.files.folder / self.files.weight_map[stored.keys[1]]
        raise CorruptCheckpointError(
            f"{path}: {stored.keys[1]} has {list(places[1].shape)} scales, which do not fit blocks of"
            f" {self.block[0]} x {self.block[1]} of {list(shape)}; fetch the model again"
        )

    def read(self, stored: Stored, start: int, target: Tensor) -> None:
        """Fill ``target`` with the rows ``start ...`` of a tensor that ``check`` passed.

        Args:
            target: ``[rows, ...]`` on the reader's device, contiguous or not; a tensor without dimensions as it is.
        """
        if not target.numel():
            return
        if stored.kind == "plain":
            self._read_plain(stored.keys[0], start, target)
        elif stored.kind == "mxfp4":
            self._read_mxfp4(stored, start, target)
        elif target.ndim == 3:
            matrix = self.files.place(stored.keys[0]).shape[1:]
            for index in range(len(target)):
                self._read_fp8(stored, start + index, 0, matrix, target[index])
        else:
            self._read_fp8(stored, 0, start, self.files.place(stored.keys[0]).shape, target)

    def windows(self, stored: Stored, start: int, end: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Values of the rows ``start`` to ``end`` in the dtype of ``like``: (first row, tensor) window by window."""
        row_bytes = math.prod(like.shape[1:]) * like.element_size()
        rows = max(1, WINDOW_BYTES // max(1, row_bytes))
        for first in range(start, end, rows):
            shape = (min(rows, end - first), *like.shape[1:])
            values = torch.empty(shape, dtype=like.dtype, device=self.device)
            self.read(stored, first, values)
            yield first, values

    def _read_plain(self, key: str, start: int, target: Tensor) -> None:
        place = self.files.place(key)
        offset = place.offset + start * place.row_bytes
        if target.is_contiguous():
            flat = target.view(-1)
            if target.device.type == "cpu" and target.dtype == place.dtype:
                self._fill(key, offset, flat)
                return
            count = WINDOW_BYTES // place.dtype.itemsize
            for part in flat.split(count):
                part.copy_(self._load(key, offset, (len(part),), place.dtype))
                offset += len(part) * place.dtype.itemsize
            return
        for part in target.split(max(1, WINDOW_BYTES // max(1, place.row_bytes))):
            part.copy_(self._load(key, offset, tuple(part.shape), place.dtype))
            offset += len(part) * place.row_bytes

    def _read_fp8(self, stored: Stored, matrix: int, start: int, shape: Sequence[int], target: Tensor) -> None:
        """Rows ``start ...`` of one matrix of ``shape``, the one with this number where several are stored in one."""
        codes, scales = (self.files.place(key) for key in stored.keys)
        rows, columns = shape
        block_rows, block_columns = self._fp8_block(stored, [codes, scales], codes.shape)
        grid = scales.shape[-2:] if len(scales.shape) >= 2 else (1, 1)
        scale_row_bytes = grid[1] * scales.dtype.itemsize
        for part in target.split(max(1, CODE_WINDOW_BYTES // columns)):
            offset = codes.offset + (matrix * rows + start) * columns * codes.dtype.itemsize
            values = self._load(stored.keys[0], offset, tuple(part.shape), codes.dtype).to(self.device).float()
            first, last = start // block_rows, math.ceil((start + len(part)) / block_rows)
            offset = scales.offset + (matrix * grid[0] + first) * scale_row_bytes
            blocks = _scale_values(self._load(stored.keys[1], offset, (last - first, grid[1]), scales.dtype))
            row_block = (torch.arange(start, start + len(part)) // block_rows - first).to(self.device)
            factors = blocks.to(self.device)[row_block]
            if columns % block_columns:
                values.mul_(factors.repeat_interleave(block_columns, dim=1)[:, :columns])
            else:
                values.view(len(part), grid[1], block_columns).mul_(factors[..., None])
            part.copy_(values)
            start += len(part)

    def _read_mxfp4(self, stored: Stored, start: int, target: Tensor) -> None:
        codes, scales = (self.files.place(key) for key in stored.keys)
        _, out, groups, half = codes.shape
        table = torch.tensor(FP4_VALUES, dtype=target.dtype, device=self.device)
        rows = max(1, CODE_WINDOW_BYTES // 2 // max(1, groups * half))
        for index in range(len(target)):
            for first in range(0, out, rows):
                count = min(rows, out - first)
                row = (start + index) * out + first
                raw = self._load(stored.keys[0], codes.offset + row * groups * half, (count, groups, half), codes.dtype)
                raw = raw.to(self.device)
                values = torch.empty((count, groups, 2 * half), dtype=target.dtype, device=self.device)
                values[..., 0::2] = table[(raw & 15).int()]
                values[..., 1::2] = table[(raw >> 4).int()]
                raw = self._load(stored.keys[1], scales.offset + row * groups, (count, groups), scales.dtype)
                torch.ldexp(values, raw.to(self.device).int()[..., None] - 127, out=values)
                target[index][:, first : first + count].copy_(values.flatten(1).t())

    def _load(self, key: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Bytes of a file as a host tensor, in the reader's one window: good until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if self._window is None or len(self._window) < size:
            self._window = None  # the old one goes before the new one comes
            pinned = self.device.type == "cuda"
            self._window = torch.empty(max(size, 2**20), dtype=torch.uint8, pin_memory=pinned)
        part = self._window[:size]
        self._fill(key, offset, part)
        return part.view(dtype).view(shape)

    def _fill(self, key: str, offset: int, flat: Tensor) -> None:
        """Read straight into a contiguous host tensor of one dimension."""
        name = self.files.weight_map[key]
        raw: Any = flat.view(torch.uint8).numpy().data
        try:
            done = read_at(self.files.descriptor(name), raw, offset)
        except OSError as error:
            raise unreadable(self.files.folder / name, error) from error
        if done < len(raw):
            raise CorruptCheckpointError(
                f"{self.files.folder / name}: ends inside of the tensor {key}; fetch the file again"
            )
        self.num_bytes += len(raw)


def _scale_values(scales: Tensor) -> Tensor:
    """Scales as float32; one of a byte is an exponent of two."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127.0).exp2()
    return scales.float().clone()
