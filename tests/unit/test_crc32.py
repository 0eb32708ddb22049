"""CRCs of parts put together, against zlib's CRC of the whole."""

from __future__ import annotations

import random
import zlib

from moe_recipes.runtime.crc32 import combine


def test_parts_of_any_length_give_the_crc_of_the_whole():
    draw = random.Random(3)
    for _ in range(200):
        whole = draw.randbytes(draw.choice([0, 1, 7, 64, 5000]))
        cuts = sorted(draw.choices(range(len(whole) + 1), k=draw.randint(0, 6)))
        pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        assert combine((len(piece), zlib.crc32(piece)) for piece in pieces) == zlib.crc32(whole)


def test_a_part_longer_than_memory_costs_nothing():
    zeros = bytes(2**20)
    million = zlib.crc32(b"a")
    for _ in range(3):
        million = zlib.crc32(zeros, million)
    assert combine([(1, zlib.crc32(b"a")), (3 * 2**20, zlib.crc32(bytes(3 * 2**20)))]) == million
    assert 0 <= combine([(1, 5), (10**13, 7)]) < 2**32
