"""The folder of checkpoints: names, the newest complete one, listing, pruning. Without torch.

Only rank 0 may ask; what one rank sees on a network file system must never decide what many ranks do.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_recipes.checkpoint.manifest import COMPLETE, VALIDATION_LOSS, read_manifest
from moe_recipes.checkpoint.trusted import check_folder
from moe_recipes.checkpoint.verify import damage, verify_checkpoint
from moe_recipes.config.errors import CorruptCheckpointError, MoeRecipesError
from moe_recipes.runtime.files import sync_folder

LATEST = "latest"
PINNED = "PINNED"
"""A file of this name in a checkpoint's folder keeps it from being pruned."""

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
    path, damaged = find_whole(ckpt_dir)
    if path is not None and damaged:
        log.warning("resuming from %s: %s", path, "; ".join(damaged.values()))
    return path


def find_whole(ckpt_dir: Path, known: Mapping[Path, str] | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to resume from, and what is wrong with each that would have come before it.

    Args:
        known: checkpoints that were found damaged otherwise, with the reason; they are passed over.
    Raises:
        CorruptCheckpointError: there are checkpoints, and all of them are damaged.
    """
    candidates = _steps(ckpt_dir)
    pointed = _pointed_to(ckpt_dir)
    if pointed is not None:
        candidates = [pointed, *(path for path in candidates if path != pointed)]
    damaged: dict[Path, str] = {}
    for path in candidates:
        problems = [known[path]] if known and path in known else verify_checkpoint(path)
        if not problems:
            return path, damaged
        damaged[path] = f"{path.name} is damaged ({problems[0]})"
    if damaged:
        raise CorruptCheckpointError(
            f"{ckpt_dir}: no checkpoint is whole: {'; '.join(damaged.values())}; move the folder away to start from"
            " step 0"
        )
    return None, damaged


def stale_checkpoints(
    ckpt_dir: Path, *, keep_last: int, keep_best: int = 0, protect: Collection[Path] = ()
) -> list[Path]:
    """What ``prune_checkpoints`` would delete, newest first. Changes nothing.

    Raises:
        ValueError: ``keep_last`` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last} would delete the newest checkpoint; it must be at least 1")
    found = list_checkpoints(ckpt_dir)
    complete = [item for item in found if item.is_complete]
    kept = {item.path.resolve() for item in (*complete[:keep_last], *best_of(complete)[:keep_best])}
    kept |= {item.path.resolve() for item in found if item.is_pinned}
    kept |= {path.resolve() for path in protect}
    if (pointed := _pointed_to(ckpt_dir)) is not None:
        kept.add(pointed.resolve())
    return [item.path for item in complete if item.path.resolve() not in kept]


def prune_checkpoints(
    ckpt_dir: Path, *, keep_last: int, keep_best: int = 0, protect: Collection[Path] = ()
) -> list[Path]:
    """Delete old complete checkpoints; returns what was deleted.

    Never deletes the newest ``keep_last``, the ``keep_best`` of least validation loss, what ``latest`` names, what is
    pinned or protected, or a damaged checkpoint, which does not count as kept. A folder is renamed before it is
    emptied, so that one half deleted is never taken for a checkpoint. A failure to delete is logged and passed over.

    Raises:
        ValueError: ``keep_last`` is below 1.
    """
    deleted = []
    for path in stale_checkpoints(ckpt_dir, keep_last=keep_last, keep_best=keep_best, protect=protect):
        doomed = path.with_name(f"{step_name(step_of(path))}.tmp-{secrets.token_hex(3)}")
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", path, error)
            continue
        deleted.append(path)
    return deleted


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One folder that may be a checkpoint."""

    path: Path
    problems: Sequence[str]
    """What is wrong with it, by manifest and sizes; empty if it is complete."""

    num_bytes: int
    """Of all its files."""

    validation_loss: float | None
    """Mean loss over the held-out batches at just this step; None where none was measured."""

    saved_s: float
    """When it was completed, in seconds since 1970, by the file system's clock; for people, never for decisions."""

    is_latest: bool

    @property
    def step(self) -> int:
        return step_of(self.path)

    @property
    def is_complete(self) -> bool:
        return not self.problems

    @property
    def is_pinned(self) -> bool:
        return os.path.lexists(self.path / PINNED)


def list_checkpoints(ckpt_dir: Path) -> list[Listed]:
    """Every folder that may be a checkpoint, newest step first. Sizes are checked, bytes are not."""
    pointed = _pointed_to(ckpt_dir)
    return [_look_at(path, is_latest=path == pointed) for path in _steps(ckpt_dir)]


def _look_at(path: Path, *, is_latest: bool) -> Listed:
    loss, saved_s = None, 0.0
    try:
        check_folder(path)
        manifest = read_manifest(path)
        problems = damage(path, manifest, hashes=False)
        loss = manifest.state.get(VALIDATION_LOSS)
    except MoeRecipesError as error:
        problems = [str(error)]
    sizes = []
    with suppress(OSError):
        saved_s = os.lstat(path).st_mtime
        saved_s = os.lstat(path / COMPLETE).st_mtime
    with suppress(OSError):
        sizes = [item.stat(follow_symlinks=False).st_size for item in os.scandir(path)]
    return Listed(
        path=path,
        problems=problems,
        num_bytes=sum(sizes),
        validation_loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        saved_s=saved_s,
        is_latest=is_latest,
    )


def best_of(listed: Iterable[Listed]) -> list[Listed]:
    """Complete checkpoints at whose step the validation loss was measured, least loss first; the older one of two."""
    measured = [item for item in listed if item.is_complete and item.validation_loss is not None]
    return sorted(measured, key=lambda item: (item.validation_loss, item.step))


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
