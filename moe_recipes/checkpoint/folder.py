"""The folder of checkpoints: names, the newest complete one, verifying, pruning.

Only rank 0 may ask; what one rank sees on a network file system must never decide what many ranks do.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path

from moe_recipes.checkpoint.manifest import RANK_PREFIX, Manifest, read_manifest
from moe_recipes.config.errors import CorruptCheckpointError, MoeRecipesError
from moe_recipes.runtime import safetensors_file
from moe_recipes.runtime.files import sync_folder

LATEST = "latest"
STEP_NAME = re.compile(r"step-(\d{8,})")
TEMPORARY_NAME = re.compile(r"step-\d{8,}\.tmp-[0-9a-f]+")
REPLACED_NAME = re.compile(r"(step-\d{8,})\.replaced-[0-9a-f]+")

log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a folder's name; ``step-00000200`` and ``step-00000200.replaced-X`` alike."""
    return int(path.name.split(".")[0].removeprefix("step-"))


def latest_checkpoint(ckpt_dir: Path) -> Path | None:
    """The checkpoint to resume from: what ``latest`` names, else the newest complete one; None if there is none.

    Sizes of all files are checked, their bytes are not. Passing over a damaged checkpoint is logged as a warning.

    Raises:
        CorruptCheckpointError: there are checkpoints, and all of them are damaged.
    """
    candidates = _steps(ckpt_dir)
    pointed = _pointed_to(ckpt_dir)
    if pointed is not None:
        candidates = [pointed, *(path for path in candidates if path != pointed)]
    reasons: list[str] = []
    for path in candidates:
        problems = verify_checkpoint(path)
        if not problems:
            if reasons:
                log.warning("resuming from %s: %s", path, "; ".join(reasons))
            return path
        reasons.append(f"{path.name} is damaged ({problems[0]})")
    if reasons:
        raise CorruptCheckpointError(
            f"{ckpt_dir}: no checkpoint is whole: {'; '.join(reasons)}; move the folder away to start from step 0"
        )
    return None


def verify_checkpoint(path: Path, *, hashes: bool = False) -> list[str]:
    """What is wrong with a checkpoint, one line a problem that names file and tensor; empty if it is good.

    Args:
        hashes: read every byte and compare CRCs too: 0.3 to 0.8 s a GiB, or the time to read it, whichever is longer.
    """
    try:
        manifest = read_manifest(path)
    except MoeRecipesError as error:
        return [str(error)]
    problems = []
    for file in (*manifest.shards, *manifest.records):
        try:
            num_bytes = os.stat(path / file.name).st_size
        except OSError as error:
            problems.append(f"{path / file.name}: {error.strerror}")
            continue
        if num_bytes != file.num_bytes:
            problems.append(f"{path / file.name}: {num_bytes} bytes instead of {file.num_bytes}")
    if hashes and not problems:
        for rank in range(manifest.num_ranks):
            problems += _damage_in_shard(path, manifest, rank)
        for file in manifest.records:
            if zlib.crc32((path / file.name).read_bytes()) != file.crc32:
                problems.append(f"{path / file.name}: its bytes have changed (CRC)")
    return problems


def prune_checkpoints(ckpt_dir: Path, *, keep_last: int, protect: Collection[Path] = ()) -> list[Path]:
    """Delete all but the newest ``keep_last`` complete checkpoints; returns what was deleted.

    Never deletes what ``latest`` names, what is protected, or a damaged checkpoint, which does not count as kept.
    A folder is renamed before it is emptied, so that one half deleted is never taken for a checkpoint. A failure to
    delete is logged and passed over.

    Raises:
        ValueError: ``keep_last`` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last} would delete the newest checkpoint; it must be at least 1")
    kept = {path.resolve() for path in protect}
    if (pointed := _pointed_to(ckpt_dir)) is not None:
        kept.add(pointed.resolve())
    complete = [path for path in _steps(ckpt_dir) if not verify_checkpoint(path)]
    deleted = []
    for path in complete[keep_last:]:
        if path.resolve() in kept:
            continue
        doomed = path.with_name(f"{step_name(step_of(path))}.tmp-{secrets.token_hex(3)}")
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", path, error)
            continue
        deleted.append(path)
    return deleted


def put_in_place(working: Path, final: Path) -> None:
    """Rename a complete folder to its final name. One of the same step that is there already makes way.

    Folders cannot be exchanged in one step everywhere, so for a moment the old one exists under ``.replaced-X``
    alone; ``latest_checkpoint`` knows that name, and ``tidy`` gives it back its own.
    """
    replaced = None
    if final.exists():
        replaced = final.with_name(f"{final.name}.replaced-{secrets.token_hex(3)}")
        os.rename(final, replaced)
    try:
        os.rename(working, final)
    except OSError:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)


def tidy(ckpt_dir: Path) -> None:
    """Remove what killed saves and prunes left behind. Nothing here is needed, so a failure is only logged."""
    for path in sorted(ckpt_dir.iterdir()):
        replaced = REPLACED_NAME.fullmatch(path.name)
        try:
            if replaced and not (ckpt_dir / replaced[1]).exists():
                os.rename(path, ckpt_dir / replaced[1])
            elif replaced or TEMPORARY_NAME.fullmatch(path.name):
                shutil.rmtree(path)
        except OSError as error:
            log.warning("cannot clear away the unfinished checkpoint %s: %s", path, error)


def _steps(ckpt_dir: Path) -> list[Path]:
    """Folders that may be complete checkpoints, newest step first; a replaced one after its replacement."""
    if not ckpt_dir.is_dir():
        return []
    names = (STEP_NAME, REPLACED_NAME)
    paths = [path for path in ckpt_dir.iterdir() if any(name.fullmatch(path.name) for name in names)]
    return sorted(paths, key=lambda path: (-step_of(path), len(path.name)))


def _pointed_to(ckpt_dir: Path) -> Path | None:
    try:
        name = (ckpt_dir / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("cannot read %s: %s", ckpt_dir / LATEST, error)
        return None
    if not STEP_NAME.fullmatch(name):
        log.warning("%s holds %r, which names no checkpoint", ckpt_dir / LATEST, name[:40])
        return None
    return ckpt_dir / name


def _damage_in_shard(path: Path, manifest: Manifest, rank: int) -> list[str]:
    """Compare the header and every tensor of one shard with the CRCs in the manifest."""
    file = manifest.shards[rank]
    expected = {RANK_PREFIX + name: tensor.pieces[0].crc32 for name, tensor in manifest.rank_tensors[rank].items()}
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            if piece.shard == rank:
                expected[name] = piece.crc32
    with open(path / file.name, "rb") as opened:
        try:
            layout = safetensors_file.read_layout(opened.fileno())
        except ValueError as error:
            return [f"{path / file.name}: {error}"]
        if zlib.crc32(layout.header) != file.crc32 or layout.places.keys() != expected.keys():
            return [f"{path / file.name}: its header has changed (CRC)"]
        return [
            f"{path / file.name}: the bytes of tensor {name!r} have changed (CRC)"
            for name, place in layout.places.items()
            if safetensors_file.checksum(opened.fileno(), place) != expected[name]
        ]
