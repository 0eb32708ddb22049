"""The run folder: where a run keeps everything, and the small files by which its processes and its operator talk.

runs/NAME/
  recipe.json       the resolved recipe          metrics.jsonl   one object a step
  manifest.json     what ran, with which versions  events.jsonl    starts, saves, stops, with times
  status.json       where the run stands         ckpt/           step-XXXXXXXX/, latest
  attempts/N/       the logs of one start: rank-00000.log ...; attempts/latest links to the newest
  export/           the Hugging Face checkpoint  STOP, SAVE      touch one to stop, or to save at the next step
  slurm/            the ledger of all jobs, and a folder for each
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from moe_recipes.config.errors import CannotWriteError, CorruptCheckpointError, MissingInputError, RecipeError
from moe_recipes.config.manifest import make_manifest
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import flatten, recipe_from_dict, recipe_to_dict

STATUS_SCHEMA_VERSION = 1
CODE_KEYS = ("moe_recipes", "python", "packages", "git")
"""Keys of manifest.json that say which code ran."""

TERMINAL_STATES = ("stopped", "failed", "done")
MAY_CHANGE = (
    "run_dir",
    "log.",
    "checkpoint.",
    "train.validate_every_steps",
    "train.validation_batches",
)
"""Keys, and sections with a dot, that a resumed run may give other values: they change no number that is trained."""

State = Literal["starting", "running", "stopped", "failed", "done"]


class RunFolder:
    """The paths of one run, and its status, events and attempts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def ckpt(self) -> Path:
        return self.path / "ckpt"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def cache(self) -> Path:
        """Token caches, unless the recipe names another place."""
        return self.path / "cache"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def slurm(self) -> Path:
        """What the host side of Slurm jobs keeps: the ledger, the lock, and a folder for each job."""
        return self.path / "slurm"

    @property
    def stop_file(self) -> Path:
        """Somebody made this file to stop the run at the next step; the run saves first."""
        return self.path / "STOP"

    @property
    def save_file(self) -> Path:
        """Somebody made this file to have a checkpoint at the next step."""
        return self.path / "SAVE"

    @property
    def has_trained(self) -> bool:
        """A start came as far as the first step: the recipe is bound. A start that ended before, say at a data file
        that is not there, binds nothing."""
        return self.metrics.exists() or self.ckpt.exists()

    def write_status(
        self,
        state: State,
        *,
        step: int | None = None,
        last_durable_step: int | None = None,
        cause: str | None = None,
        rank: int | None = None,
        host: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        """Replace status.json at once: a reader sees the old or the new one, never half of one.

        ``step`` and ``last_durable_step`` keep their last value if not given; the rest does not.

        Raises:
            CannotWriteError: the folder cannot be written.
        """
        before = self.read_status() or {}
        status = {
            "schema_version": STATUS_SCHEMA_VERSION,
            "state": state,
            "step": before.get("step") if step is None else step,
            "last_durable_step": before.get("last_durable_step") if last_durable_step is None else last_durable_step,
            "cause": cause,
            "rank": rank,
            "host": host or socket.gethostname(),
            "exit_code": exit_code,
            "time": now(),
        }
        # The trainer reports every step: waiting for the disk each time would cost more than a status is worth.
        write_json(self.status, status, durable=state != "running")

    def read_status(self) -> dict[str, Any] | None:
        """The last status, or None if there is none or it cannot be read."""
        try:
            status = json.loads(self.status.read_bytes())
        except (OSError, ValueError):
            return None
        return status if isinstance(status, dict) else None

    def append_event(self, event: str, **fields: Any) -> None:
        """Add one line to events.jsonl, with the time.

        Raises:
            CannotWriteError: the file cannot be written.
        """
        append_line(self.events, {"time": now(), "event": event, **fields})

    def update_manifest(self, **fields: Any) -> None:
        """Set top-level keys of manifest.json."""
        write_json(self.manifest, {**self._read_manifest(), **fields})

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self.manifest.read_bytes())
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def note_other_code(self, made_of: Mapping[str, Any]) -> None:
        """Add an event if versions or commit of this start are not those of manifest.json, which is the first start's.

        Raises:
            CannotWriteError: the file cannot be written.
        """
        before, after = ({key: record.get(key) for key in CODE_KEYS} for record in (self._read_manifest(), made_of))
        if changes := recipe_changes(before, after):
            self.append_event("code changed", changes=[list(change) for change in changes])

    def new_attempt(self) -> Path:
        """Make ``attempts/<n>/`` for one start of the run and point ``attempts/latest`` to it.

        Raises:
            CannotWriteError: the folder cannot be written.
        """
        try:
            self.attempts.mkdir(parents=True, exist_ok=True)
            taken = [int(item.name) for item in self.attempts.iterdir() if item.name.isdigit()]
            folder = self._make_attempt(max(taken, default=0) + 1)
            link = self.attempts / f".latest-{uuid.uuid4().hex}"
            link.symlink_to(folder.name)
            link.replace(self.attempts / "latest")
        except OSError as error:
            raise _cannot_write(self.attempts, error) from error
        return folder

    def _make_attempt(self, number: int) -> Path:
        """The first number from here on that nobody took: another start may be quicker, and a network file system may
        show this host an old list of the folder."""
        while True:
            with suppress(FileExistsError):
                (folder := self.attempts / str(number)).mkdir()
                return folder
            number += 1

    def read_recipe(self, overrides: tuple[str, ...] = ()) -> Recipe:
        """The recipe that the run was started with.

        Raises:
            MissingInputError: this is no run folder.
            CorruptCheckpointError: recipe.json is damaged.
        """
        return recipe_from_dict(self._read_recipe_json(), source=str(self.recipe), overrides=overrides)

    def _read_recipe_json(self) -> Any:
        try:
            return json.loads(self.recipe.read_bytes())
        except OSError as error:
            raise MissingInputError(
                f"{self.recipe}: {error.strerror}; {self.path} is not the folder of a run"
            ) from error
        except ValueError as error:
            raise CorruptCheckpointError(
                f"{self.recipe}: not valid JSON: {error}; restore the file, or set another run_dir"
            ) from error


def run_folder_of(recipe: Recipe) -> RunFolder:
    """``run_dir`` of the recipe, or ``runs/NAME``."""
    return RunFolder(recipe.run_dir or Path("runs") / recipe.name)


def check_run(recipe: Recipe, folder: RunFolder) -> list[tuple[str, Any, Any]]:
    """Make sure that this process may go on with the run. Every rank that torchrun or srun started calls this: ranks
    that leave a refusal to rank 0 would wait for it until their join times out.

    Returns:
        What changed since the run was started, as ``recipe_changes`` gives it.
    Raises:
        CannotWriteError: the folder cannot be made or written, tried by really writing.
        RecipeError: the run has trained with another recipe; every difference is listed.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        probe = folder.path / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"can this folder be written?")
        probe.unlink()
    except OSError as error:
        raise _cannot_write(folder.path, error) from error
    if not folder.recipe.exists():
        return []
    changes = recipe_changes(folder._read_recipe_json(), recipe_to_dict(recipe))
    refused = [change for change in changes if not _may_change(change[0])]
    if refused and folder.has_trained:
        old_values = ", ".join(f"{key}={_short(old)}" for key, old, _ in refused)
        new_values = ", ".join(f"{key}={_short(value)}" for key, _, value in refused)
        raise RecipeError(
            f"{folder.path} was started with {old_values}; the recipe now says {new_values};"
            " use another run_dir or restore the value"
        )
    return changes


def prepare_run(recipe: Recipe, folder: RunFolder) -> RunFolder:
    """Make the run folder, or accept an old one for a resume. One process of a run calls this.

    Raises:
        CannotWriteError, RecipeError: as ``check_run``.
    """
    if changes := check_run(recipe, folder):
        folder.append_event("recipe changed", changes=[list(change) for change in changes])
    new = recipe_to_dict(recipe)
    write_json(folder.recipe, new)
    made_of = make_manifest(new)
    if folder.has_trained and folder.manifest.exists():
        folder.note_other_code(made_of)
    else:
        write_json(folder.manifest, made_of)
    return folder


def recipe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """``(key, old value, new value)`` of every leaf that differs, by dotted key; an absent leaf is None."""
    before, after = flatten(old), flatten(new)
    return [
        (key, before.get(key), after.get(key)) for key in sorted({*before, *after}) if before.get(key) != after.get(key)
    ]


def _may_change(key: str) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in MAY_CHANGE)


def _short(value: Any) -> str:
    return str(value) if isinstance(value, float | str) else json.dumps(value)


def now() -> str:
    """UTC, ISO 8601, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write JSON through a temporary file beside ``path``, so that ``path`` is whole at every moment.

    Args:
        durable: wait until the disk has it.

    Raises:
        CannotWriteError: with the file and the system's reason.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # where the folder itself is gone or no folder, this fails as well
            temporary.unlink()
        raise _cannot_write(path, error) from error


def append_line(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Add one object to a file of JSON lines, or CannotWriteError. Half a line of a power loss costs only itself."""
    try:
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and (file.seek(size - 1), file.read(1))[1] != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> CannotWriteError:
    return CannotWriteError(f"{path}: cannot be written: {error.strerror or error}; free space, or set another run_dir")
