"""``python -m moe_recipes.checkpoint JSON``: the verb ``ckpt``, in a process of its own. Only ``diff`` loads torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_recipes.checkpoint import folder
from moe_recipes.checkpoint.verify import verify_checkpoint
from moe_recipes.config.errors import (
    EXIT_CORRUPT_CHECKPOINT,
    EXIT_OK,
    CannotWriteError,
    CorruptCheckpointError,
    MissingInputError,
)
from moe_recipes.launch.cli import guarded
from moe_recipes.launch.operator.status import duration
from moe_recipes.runtime.files import sync_folder, write_durably

GB = 1e9


def main(asked: Mapping[str, Any]) -> int:
    actions: dict[str, Callable[[Mapping[str, Any]], int]] = {
        "ls": _ls, "verify": _verify, "prune": _prune, "pin": _pin, "diff": _diff
    }  # fmt: skip
    return actions[asked["action"]](asked)


def chosen(place: Mapping[str, Any], *, default: str = folder.LATEST) -> Path:
    """The folder of the checkpoint that was named; the one to resume from where none was.

    Raises:
        MissingInputError: it is not there, or no checkpoint has a validation loss.
        CorruptCheckpointError: ``latest`` was meant, and no checkpoint is whole.
    """
    ckpt_dir, name = Path(place["ckpt_dir"]), place["name"] or default
    if name == "best":
        best = folder.best_of(folder.list_checkpoints(ckpt_dir))
        if not best:
            raise MissingInputError(f"{ckpt_dir}: no checkpoint has a validation loss; set train.validate_every_steps")
        return best[0].path
    if name == folder.LATEST:
        path = folder.latest_checkpoint(ckpt_dir)
        if path is None:
            raise MissingInputError(f"{ckpt_dir}: no checkpoint; train the run first")
        return path
    if not os.path.lexists(ckpt_dir / name):
        known = [path.path.name for path in folder.list_checkpoints(ckpt_dir)]
        raise MissingInputError(f"{ckpt_dir / name}: no such checkpoint; there are: {', '.join(known) or 'none'}")
    return ckpt_dir / name


def _say(asked: Mapping[str, Any], report: Any, lines: list[str]) -> None:
    print(json.dumps(report, indent=2) if asked["json"] else "\n".join(lines))


def _ls(asked: Mapping[str, Any]) -> int:
    found = folder.list_checkpoints(Path(asked["ckpt_dir"]))
    if asked["name"] is not None:
        found = [item for item in found if item.path == chosen(asked)]
    best = [item.path for item in folder.best_of(found)[:1]]
    rows, lines = [], [f"{'checkpoint':<16} {'state':<9} {'GB':>10} {'age':>10} {'validation':>10}  labels"]
    for item in found:
        has = {"latest": item.is_latest, "best": item.path in best, "pinned": item.is_pinned}
        labels = [label for label, there in has.items() if there]
        state, age_s = "complete" if item.is_complete else "damaged", max(time.time() - item.saved_s, 0.0)
        rows.append(
            {
                "name": item.path.name,
                "step": item.step,
                "state": state,
                "problems": list(item.problems),
                "bytes": item.num_bytes,
                "age_s": age_s,
                "validation_loss": item.validation_loss,
                "labels": labels,
            }
        )
        loss = "-" if item.validation_loss is None else f"{item.validation_loss:.4f}"
        size = f"{item.num_bytes / GB:>10.3f} {duration(age_s):>10} {loss:>10}"
        lines.append(f"{item.path.name:<16} {state:<9} {size}  {','.join(labels)}".rstrip())
        lines += [f"  {problem}" for problem in item.problems]
    _say(asked, rows, lines if found else [f"{asked['ckpt_dir']}: no checkpoint"])
    return EXIT_OK


def _verify(asked: Mapping[str, Any]) -> int:
    """Every checkpoint of the run, or the one that was named."""
    if asked["name"] is None:
        paths = [item.path for item in folder.list_checkpoints(Path(asked["ckpt_dir"]))]
        if not paths:
            raise MissingInputError(f"{asked['ckpt_dir']}: no checkpoint; train the run first")
    else:
        paths = [chosen(asked)]
    problems = {path: verify_checkpoint(path, hashes=asked["hash"]) for path in paths}
    what = "every byte" if asked["hash"] else "sizes"
    if asked["json"]:
        report = {path.name: {"checked": what, "problems": found} for path, found in problems.items()}
        print(json.dumps(report, indent=2))
        return EXIT_CORRUPT_CHECKPOINT if any(problems.values()) else EXIT_OK
    for path, found in problems.items():
        print("\n".join(found) if found else f"{path}: whole ({what} checked)")
    damaged = [path.name for path, found in problems.items() if found]
    if damaged:
        raise CorruptCheckpointError(
            f"{asked['ckpt_dir']}: {', '.join(damaged)} damaged; a resume takes the newest whole one, or restore a copy"
        )
    return EXIT_OK


def _prune(asked: Mapping[str, Any]) -> int:
    ckpt_dir = Path(asked["ckpt_dir"])
    rules = {
        "keep_last": asked["keep_last"],
        "keep_best": asked["keep_best"],
        "protect": [ckpt_dir / folder.step_name(step) for step in asked["resumed"]],
    }
    stale = folder.stale_checkpoints(ckpt_dir, **rules)
    deleted = folder.prune_checkpoints(ckpt_dir, **rules) if asked["yes"] else []
    left = [path for path in stale if path not in deleted]
    lines = [f"deleted {path}" for path in deleted]
    lines += [f"{'could not delete' if asked['yes'] else 'would delete'} {path}" for path in left]
    if stale and not asked["yes"]:
        lines.append("nothing was deleted; add --yes")
    report = {"deleted": [path.name for path in deleted], "stale": [path.name for path in left]}
    _say(asked, report, lines or ["nothing to delete"])
    if left and asked["yes"]:
        raise CannotWriteError(f"{left[0]}: cannot be deleted; run as the owner of the run")
    return EXIT_OK


def _pin(asked: Mapping[str, Any]) -> int:
    path = chosen(asked)
    mark = path / folder.PINNED
    try:
        if asked["undo"]:
            mark.unlink(missing_ok=True)
        else:
            write_durably(mark, b"")
        sync_folder(path)
    except OSError as error:
        raise CannotWriteError(f"{mark}: cannot be written: {error.strerror}; run as the owner of the run") from error
    said = f"{path}: {'may be pruned again' if asked['undo'] else 'is never pruned'}"
    _say(asked, {"checkpoint": str(path), "pinned": not asked["undo"]}, [said])
    return EXIT_OK


def _diff(asked: Mapping[str, Any]) -> int:
    from moe_recipes.checkpoint.diff import compare, lines_of

    report = compare(chosen(asked), chosen(asked["other"]))
    _say(asked, report, lines_of(report))
    return EXIT_OK


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    sys.exit(guarded(lambda: main(words), as_json=words["json"]))
