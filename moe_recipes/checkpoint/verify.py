"""What is wrong with a checkpoint: sizes always, every byte on request. Without torch."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_recipes.checkpoint.manifest import RANK_PREFIX, Manifest, SavedFile, read_manifest
from moe_recipes.checkpoint.trusted import check_folder, open_trusted, read_trusted, size_of
from moe_recipes.config.errors import MoeRecipesError
from moe_recipes.runtime.safetensors_header import checksum, read_header

MOST_THREADS = 8


def verify_checkpoint(path: Path, *, hashes: bool = False) -> list[str]:
    """What is wrong with a checkpoint, one line a problem that names file and tensor; empty if it is good.

    Args:
        hashes: read every byte and compare CRCs too: 0.3 to 0.8 s a GiB and processor, or the time to read it,
            whichever is longer. Up to 8 shards are read at once.
    """
    try:
        check_folder(path)
        manifest = read_manifest(path)
    except MoeRecipesError as error:
        return [str(error)]
    return damage(path, manifest, hashes=hashes)


def damage(path: Path, manifest: Manifest, *, hashes: bool) -> list[str]:
    """``verify_checkpoint`` of a checkpoint whose manifest has been read."""
    problems = []
    for file in (*manifest.shards, *manifest.records):
        try:
            num_bytes = size_of(path / file.name)
        except MoeRecipesError as error:
            problems.append(str(error))
            continue
        if num_bytes != file.num_bytes:
            problems.append(f"{path / file.name}: {num_bytes} bytes instead of {file.num_bytes}")
    if not hashes or problems:
        return problems
    threads = max(1, min(MOST_THREADS, os.cpu_count() or 1, manifest.num_ranks))
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for found in pool.map(lambda rank: _damage_of_rank(path, manifest, rank), range(manifest.num_ranks)):
            problems += found
    return problems


def _damage_of_rank(path: Path, manifest: Manifest, rank: int) -> list[str]:
    try:
        return [*_damage_in_shard(path, manifest, rank), *_damage_in_record(path, manifest.records[rank])]
    except (MoeRecipesError, OSError) as error:
        return [str(error)]


def _damage_in_record(path: Path, file: SavedFile) -> list[str]:
    if zlib.crc32(read_trusted(path / file.name, max_bytes=file.num_bytes)) == file.crc32:
        return []
    return [f"{path / file.name}: its bytes have changed (CRC)"]


def _damage_in_shard(path: Path, manifest: Manifest, rank: int) -> list[str]:
    """Compare the header and every tensor of one shard with the CRCs in the manifest."""
    file = manifest.shards[rank]
    expected = {RANK_PREFIX + name: tensor.pieces[0].crc32 for name, tensor in manifest.rank_tensors[rank].items()}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            if piece.shard == rank:
                expected[name] = piece.crc32
    fd = open_trusted(path / file.name)
    try:
        try:
            header = read_header(fd)
        except ValueError as error:
            return [f"{path / file.name}: {error}"]
        if zlib.crc32(header.raw) != file.crc32 or header.spans.keys() != expected.keys():
            return [f"{path / file.name}: its header has changed (CRC)"]
        return [
            f"{path / file.name}: the bytes of tensor {name!r} have changed (CRC)"
            for name, span in header.spans.items()
            if checksum(fd, offset=span.offset, num_bytes=span.num_bytes) != expected[name]
        ]
    finally:
        os.close(fd)
