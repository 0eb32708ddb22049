"""The header of a safetensors file, and checksums of its bytes, without torch: an operator's commands read these.

| 8 bytes: N | N bytes: JSON {name: {dtype, shape, data_offsets}} padded with spaces | tensor | tensor | ...
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 64 * 2**20
"""Host memory that writing or reading one tensor needs beyond the tensor itself."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one value, by the dtype's name in safetensors."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where one tensor lies in a file. ``offset`` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Header:
    raw: bytes
    """The first bytes of the file: length, JSON, padding."""

    spans: Mapping[str, Span]
    total_bytes: int


def read_header(file: int) -> Header:
    """The header of an open file. Nothing in it is trusted: every span must lie inside the file and follow the last.

    Raises:
        ValueError: the file is shorter than it says, or its header is not that of a safetensors file.
    """
    file_bytes = os.fstat(file).st_size
    length_bytes = os.pread(file, 8, 0)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"no safetensors header in the {file_bytes} bytes of the file")
    text = bytearray(length)
    if read_at(file, memoryview(text), 8) < length:
        raise ValueError("the safetensors header is cut short")
    try:
        spans = _parse_spans(json.loads(bytes(text)), base=8 + length)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the safetensors header is damaged ({type(error).__name__}: {error})") from error
    end = max((span.offset + span.num_bytes for span in spans.values()), default=8 + length)
    if end != file_bytes:
        raise ValueError(f"the file has {file_bytes} bytes, its header says {end}")
    return Header(raw=length_bytes + bytes(text), spans=spans, total_bytes=end)


def checksum(file: int, *, offset: int, num_bytes: int) -> int:
    """The CRC-32 of bytes on disk, read in chunks; a file that ends early gives another value."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, num_bytes)))
    crc = 0
    for start in range(0, num_bytes, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, num_bytes - start)]
        crc = zlib.crc32(part[: read_at(file, part, offset + start)], crc)
    return crc


def read_at(fd: int, raw: memoryview, offset: int) -> int:
    """``os.preadv`` until ``raw`` is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(raw):
        count = os.preadv(fd, [raw[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _parse_spans(header: Any, *, base: int) -> dict[str, Span]:
    header.pop("__metadata__", None)
    spans, expected = {}, 0
    for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = spec["data_offsets"]
        span = Span(dtype=spec["dtype"], shape=tuple(spec["shape"]), offset=base + start)
        if not all(type(size) is int and size >= 0 for size in span.shape):
            raise ValueError(f"tensor {name!r} has the shape {list(span.shape)}")
        if start != expected or end - start != span.num_bytes:
            raise ValueError(f"tensor {name!r} does not lie where its shape and its neighbours say")
        spans[name], expected = span, end
    return spans
