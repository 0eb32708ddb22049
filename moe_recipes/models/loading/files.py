"""The weight files of a Hugging Face folder: what the index says, what is really in them, and what may not be there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_recipes.config.errors import (
    CorruptCheckpointError,
    InfrastructureError,
    MissingInputError,
    MoeRecipesError,
    RecipeError,
)
from moe_recipes.models.exporting.plan import INDEX_NAME
from moe_recipes.runtime.safetensors_file import FileLayout, Place, read_layout

SINGLE_NAME = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class WeightFiles:
    """Weight files, opened one by one when something in them is asked for. Use as a context manager: it closes them.

    A file that lies behind a symbolic link is read, as the hub's cache is made of such links; a name in the index that
    leads out of the folder is not.
    """

    def __init__(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        self.folder = folder
        self.weight_map = weight_map
        """Key -> file name; empty where nothing is known."""

        self._layouts: dict[str, FileLayout] = {}
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def names(self) -> list[str]:
        """File names, sorted."""
        return sorted({*self.weight_map.values()})

    @property
    def opened(self) -> list[str]:
        """Names of the files that were opened so far."""
        return sorted(self._layouts)

    def descriptor(self, name: str) -> int:
        """A descriptor of the file, open for reading until the end of the context.

        Raises:
            MissingInputError, InfrastructureError: it cannot be opened.
        """
        if name not in self._descriptors:
            try:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise unreadable(self.folder / name, error) from error
        return self._descriptors[name]

    def layout(self, name: str) -> FileLayout:
        """The header of one file.

        Raises:
            MissingInputError: not there, or not to be read.
            CorruptCheckpointError: cut short, too long, or no safetensors file.
        """
        if name not in self._layouts:
            path = self.folder / name
            try:
                self._layouts[name] = read_layout(self.descriptor(name))
            except ValueError as error:
                raise CorruptCheckpointError(
                    f"{path}: cut short or not safetensors ({error}); fetch the file again"
                ) from error
            except OSError as error:
                raise unreadable(path, error) from error
        return self._layouts[name]

    def is_here(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def place(self, key: str) -> Place:
        """Where a key of ``weight_map`` lies in its file.

        Raises:
            MissingInputError, CorruptCheckpointError: as ``layout``; or the file lacks the key.
        """
        name = self.weight_map[key]
        place = self.layout(name).places.get(key)
        if place is None:
            raise CorruptCheckpointError(
                f"{self.folder / name}: lacks the tensor {key}, which {INDEX_NAME} puts there; it belongs to another"
                " model or revision: fetch the model again"
            )
        return place

    def check_present(self) -> None:
        """Every file of the index is there and not empty. Opens none.

        Raises:
            MissingInputError, CorruptCheckpointError: names the first that is not.
        """
        names = self.names
        for name in names:
            path = self.folder / name
            if not path.is_file():
                link = f"; it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
                raise MissingInputError(
                    f"{path}: not there ({len(names)} weight files expected){link}; fetch the model again"
                )
            if path.stat().st_size == 0:
                raise CorruptCheckpointError(f"{path}: empty; fetch the file again")

    def check_contents(self, names: Iterable[str]) -> None:
        """These files hold the keys that the index says, and no key that another file holds too.

        Raises:
            MissingInputError, CorruptCheckpointError: the first that is wrong.
        """
        wanted: dict[str, list[str]] = {}
        for key, name in self.weight_map.items():
            wanted.setdefault(name, []).append(key)
        for name in names:
            for key in wanted.get(name, ()):
                self.place(key)
            for key in self.layout(name).places:
                home = self.weight_map.get(key, name)
                if home == name:
                    continue
                if key in self.layout(home).places:
                    raise CorruptCheckpointError(
                        f"{self.folder / name}: the tensor {key} is in {home} too, and nothing says which of them"
                        " counts; fetch the model again into an empty folder"
                    )


def unreadable(path: Path, error: OSError) -> MoeRecipesError:
    """What an ``OSError`` on a weight file means to a user."""
    reason = error.strerror or type(error).__name__
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return MissingInputError(f"{path}: cannot be read: {reason}; fetch the model again or mend its permissions")
    return InfrastructureError(f"{path}: cannot be read: {reason}; look at the file system, then start again")


def open_weights(folder: Path) -> WeightFiles:
    """The weights of a model folder, by its index or its only file. Reads the index, or the header of that file.

    Raises:
        MissingInputError: there are none.
        CorruptCheckpointError: the index or the only file is damaged, or a name in the index leaves the folder.
        RecipeError: the folder has pickled weights only.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.is_file():
        weight_map = _read_index(index)
        if single.is_file() and SINGLE_NAME not in weight_map.values():
            raise CorruptCheckpointError(
                f"{single}: beside {INDEX_NAME}, which names other files; Transformers reads the first, others the"
                " second: remove the one that is not the model"
            )
        return WeightFiles(folder, weight_map)
    if single.is_file() or single.is_symlink():
        files = WeightFiles(folder, {"": SINGLE_NAME})
        files.check_present()
        with files:
            return WeightFiles(folder, dict.fromkeys(files.layout(SINGLE_NAME).places, SINGLE_NAME))
    pickles = next((name for name in PICKLES if (folder / name).exists()), None)
    if pickles is not None:
        raise RecipeError(
            f"{folder / pickles}: pickled weights, which can run any code when they are read, and no safetensors file"
            " beside them; take a revision of the model with safetensors files, or convert it where you trust it"
        )
    raise MissingInputError(f"{single}: not there (1 weight files expected); fetch the model again")


def _read_index(path: Path) -> dict[str, str]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"it names {twice!r} twice")
        return found

    try:
        weight_map = json.loads(path.read_bytes(), object_pairs_hook=once)["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("its weight_map is empty, or names something that is no file")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path}: not a safetensors index ({error}); fetch the file again") from error
    for name in sorted({*weight_map.values()}):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CorruptCheckpointError(f"{path}: file name {name!r} leaves the model folder; do not trust this model")
    return dict(weight_map)
