"""The CRC-32 of a whole from the CRC-32 of its parts, so that ranks that each wrote a part read nothing again.

Appending n bytes to a text multiplies its CRC by x^(8n), modulo the CRC's polynomial over GF(2). Bit 31 - i of an
integer here is the coefficient of x^i, as zlib has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def _times(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x^(8 * num_bytes) modulo the polynomial, by repeated squaring. Parts have few different lengths."""
    power, square, bits = _ONE, _ONE >> 1, 8 * num_bytes
    while bits:
        if bits & 1:
            power = _times(square, power)
        square, bits = _times(square, square), bits >> 1
    return power


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of parts one after another. About 5 microseconds a part.

    Args:
        parts: (bytes, CRC-32 as ``zlib.crc32`` gives it) of each.
    """
    whole = 0
    for num_bytes, crc in parts:
        whole = _times(_shift(num_bytes), whole) ^ crc
    return whole
