"""Write and read safetensors files by byte ranges, so that a large file never exists twice in memory.

    | 8 bytes: N | N bytes: JSON {name: {dtype, shape, data_offsets}} padded with spaces | tensor | tensor | ...

The place of every byte follows from names, dtypes and shapes alone. So one process can create a file and many can
write their rows of the same tensor into it, and a rank can read just the rows that it holds.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_recipes.runtime.safetensors_header import CHUNK_BYTES, MAX_HEADER_BYTES, read_at, read_header

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one tensor lies in a file. ``offset`` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_rows(self) -> int:
        """Size of dimension 0; a tensor without dimensions is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """The header of a safetensors file and the place of every tensor."""

    header: bytes
    """The first bytes of the file: length, JSON, padding."""

    places: Mapping[str, Place]
    total_bytes: int


def plan_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> FileLayout:
    """Lay out a file for tensors of these dtypes and shapes.

    Wide dtypes come first, else in the given order: every tensor then starts at a multiple of its element size,
    which readers that map the file need.

    Raises:
        ValueError: a dtype that safetensors lacks, the reserved name ``__metadata__``, or a header over its limit.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: safetensors has no dtype {dtype}")
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named '__metadata__': safetensors reserves it")
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header of {len(tensors)} tensors has {len(text)} bytes; the limit is {MAX_HEADER_BYTES}")
    base = 8 + len(text)
    places = {
        name: Place(dtype=tensors[name][0], shape=tuple(tensors[name][1]), offset=base + start)
        for name, start in starts.items()
    }
    return FileLayout(header=len(text).to_bytes(8, "little") + text, places=places, total_bytes=base + end)


def create_file(path: str | os.PathLike[str], layout: FileLayout) -> None:
    """Create (or empty) the file at its full size with its header, and bring it to disk. Tensors read as zeros."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(fd, layout.total_bytes)
        write_at(fd, memoryview(layout.header), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_rows(
    file: int | str | os.PathLike[str], layout: FileLayout, name: str, first_row: int, tensor: torch.Tensor
) -> int:
    """Write ``tensor`` as the rows ``first_row ...`` of tensor ``name``; returns the CRC-32 of its bytes.

    Several processes may write rows of one file at the same time. The tensor may be on any device and need not be
    contiguous: it is copied to the host in chunks of ``CHUNK_BYTES``. The CRC costs 0.3 to 0.8 s a GiB.

    Args:
        file: a descriptor open for writing, which the caller brings to disk; or a path, brought to disk here.
        tensor: ``[rows, ...]`` with the columns and dtype of the layout; no dimensions if the layout has none.
    Raises:
        ValueError: dtype or shape differ from the layout, or the rows lie outside of it.
    """
    if not isinstance(file, int):
        fd = os.open(file, os.O_WRONLY)
        try:
            crc = write_rows(fd, layout, name, first_row, tensor)
            os.fsync(fd)
        finally:
            os.close(fd)
        return crc
    place = layout.places[name]
    _check_rows(place, name, first_row, tensor)
    offset, crc = place.offset + first_row * place.row_bytes, 0
    for chunk in _chunks(tensor.detach()):
        raw = _host_bytes(chunk)
        crc = zlib.crc32(raw, crc)
        write_at(file, raw, offset)
        offset += len(raw)
    return crc


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Write a whole file tensor by tensor and bring it to disk; returns the CRC-32 of each tensor's bytes."""
    layout = plan_header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
    crcs = {}
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_at(fd, memoryview(layout.header), 0)
        for name in layout.places:
            crcs[name] = write_rows(fd, layout, name, 0, tensors[name])
        os.fsync(fd)
    finally:
        os.close(fd)
    return crcs


def read_layout(file: int | str | os.PathLike[str]) -> FileLayout:
    """The header of a file. Nothing in it is trusted: every place must lie inside the file and follow the last one.

    Raises:
        ValueError: the file is shorter than it says, or its header is not that of a safetensors file.
    """
    if not isinstance(file, int):
        fd = os.open(file, os.O_RDONLY)
        try:
            return read_layout(fd)
        finally:
            os.close(fd)
    header = read_header(file)
    places = {
        name: Place(dtype=DTYPES[span.dtype], shape=span.shape, offset=span.offset)
        for name, span in header.spans.items()
    }
    return FileLayout(header=header.raw, places=places, total_bytes=header.total_bytes)


def read_rows(file: int, layout: FileLayout, name: str, first_row: int, out: torch.Tensor) -> int:
    """Fill ``out`` with the rows ``first_row ...`` of tensor ``name``; returns the CRC-32 of the bytes read.

    Reads straight into a contiguous CPU tensor, else through a host buffer of ``CHUNK_BYTES``.

    Args:
        file: a descriptor open for reading.
        out: ``[rows, ...]`` on any device, contiguous or not; its dtype and columns are those of the layout.
    Raises:
        ValueError: dtype or shape differ from the layout, the rows lie outside of it, or the file ends too early.
    """
    place = layout.places[name]
    _check_rows(place, name, first_row, out)
    offset, crc = place.offset + first_row * place.row_bytes, 0
    with torch.no_grad():
        for chunk in _chunks(out.detach()):
            direct = chunk.device.type == "cpu" and chunk.is_contiguous()
            host = chunk if direct else _host_empty(chunk)
            raw = host.view(-1).view(torch.uint8).numpy().data
            if read_at(file, raw, offset) < len(raw):
                raise ValueError(f"the file ends inside of tensor {name!r}")
            crc = zlib.crc32(raw, crc)
            if not direct:
                chunk.copy_(host)
            offset += len(raw)
    return crc


def write_at(fd: int, raw: memoryview, offset: int) -> None:
    """``os.pwrite`` until every byte is written: a single call stops at 2 GiB, or where a signal interrupts it."""
    while raw:
        written = os.pwrite(fd, raw, offset)
        raw, offset = raw[written:], offset + written


def _check_rows(place: Place, name: str, first_row: int, tensor: torch.Tensor) -> None:
    rows = tensor.shape[0] if tensor.dim() else 1
    same_columns = tuple(tensor.shape[1:]) == place.shape[1:] and bool(tensor.dim()) == bool(place.shape)
    if tensor.dtype != place.dtype or not same_columns:
        raise ValueError(
            f"tensor {name!r}: {tensor.dtype} {tuple(tensor.shape)} does not fit into {place.dtype} {place.shape}"
        )
    if not 0 <= first_row <= first_row + rows <= place.num_rows:
        raise ValueError(f"tensor {name!r}: rows {first_row}..{first_row + rows} are outside of {place.shape}")


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces of at most ``CHUNK_BYTES`` (or of one row, if it is not contiguous), in order, sharing storage."""
    if tensor.numel() == 0:
        return
    if tensor.dim() == 0 or tensor.is_contiguous():
        yield from torch.split(tensor.reshape(-1), max(1, CHUNK_BYTES // tensor.element_size()))
        return
    row_bytes = tensor[0].numel() * tensor.element_size()
    yield from torch.split(tensor, max(1, CHUNK_BYTES // row_bytes))


def _host_bytes(chunk: torch.Tensor) -> memoryview:
    if chunk.device.type != "cpu" or not chunk.is_contiguous():
        chunk = _host_empty(chunk).copy_(chunk)
    return chunk.view(-1).view(torch.uint8).numpy().data


def _host_empty(like: torch.Tensor) -> torch.Tensor:
    """A contiguous host tensor; pinned for CUDA, where copies are several times faster (torch caches the buffer)."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
