"""A `docker save` archive as one root file system: its layers merged into one tar stream.

Nothing is unpacked on the way, so it needs no root and no space beside the result, and a path in a layer cannot lead
out of the root file system. The image's environment becomes /etc/environment and its entry point /etc/rc, which is
where enroot keeps them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe_recipes.config.errors import MissingInputError, first_line

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
GENERATED = ("etc/environment", "etc/rc")


class ArchivedImage(NamedTuple):
    """What the archive says of its image."""

    config: dict[str, Any]
    digest: str
    """``sha256:...`` of the configuration, which engines show as the image's id."""

    layers: tuple[str, ...]
    """Members of the archive, the lowest first."""


def read_archive(path: Path) -> ArchivedImage:
    """Read the manifest of a `docker save` archive.

    Raises ``MissingInputError`` where the file is none, holds several images, or was changed after it was written.
    """
    try:
        with tarfile.open(path) as archive:
            manifest = json.loads(_read(archive, "manifest.json"))
            if len(manifest) != 1:
                raise MissingInputError(f"{path} holds {len(manifest)} images; save one to the archive")
            raw = _read(archive, manifest[0]["Config"])
            digest = hashlib.sha256(raw).hexdigest()
            if digest not in manifest[0]["Config"]:
                raise MissingInputError(
                    f"{path}: {manifest[0]['Config']} has another hash than its name; save it again"
                )
            layers = tuple(manifest[0]["Layers"])
            for layer in layers:
                archive.getmember(layer)
            return ArchivedImage(json.loads(raw).get("config") or {}, f"sha256:{digest}", layers)
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError) as error:
        wanted = "an archive as `docker save` or `buildah push IMAGE docker-archive:FILE` write it"
        raise MissingInputError(f"{path} is not {wanted}: {first_line(error)}") from error


def write_rootfs(path: Path, image: ArchivedImage, out: IO[bytes]) -> None:
    """Write the merged root file system as a tar stream.

    Raises ``BrokenPipeError`` where the reader ended, ``MissingInputError`` where a layer is damaged.
    """
    texts = (environment_file(image.config), rc_file(image.config))
    try:
        with tarfile.open(path) as archive, tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as merged:
            for name, text in zip(GENERATED, texts, strict=True):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(text.encode()), 0o755 if name == "etc/rc" else 0o644
                merged.addfile(entry, io.BytesIO(text.encode()))
            for entry, content in _merged_entries(archive, image.layers):
                merged.addfile(entry, content)
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise MissingInputError(f"{path}: a layer cannot be read: {first_line(error)}; save the image again") from error


def environment_file(config: dict[str, Any]) -> str:
    """The image's environment, one NAME=VALUE a line. Raises ``MissingInputError`` where a value has several lines."""
    lines = config.get("Env") or ()
    for line in lines:
        if "\n" in line:
            name = line.partition("=")[0]
            raise MissingInputError(
                f"the image's {name} has several lines, which /etc/environment cannot hold; unset it"
            )
    return "".join(f"{line}\n" for line in lines)


def rc_file(config: dict[str, Any]) -> str:
    """A shell script that goes to the image's working folder and starts a command through its entry point."""
    entry = " ".join(shlex.quote(word) for word in config.get("Entrypoint") or ())
    command = " ".join(shlex.quote(word) for word in config.get("Cmd") or ())
    folder = shlex.quote(config.get("WorkingDir") or "/")
    start = "".join(f"{word} " for word in ("exec", entry) if word)
    return f'#!/bin/sh\ncd {folder} || exit 1\nif [ $# -gt 0 ]; then {start}"$@"; else {start}{command}; fi\n'


def _merged_entries(
    archive: tarfile.TarFile, layers: tuple[str, ...]
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Entries of the merged tree. Layers are read from the top, so what is met first is what the image shows."""
    seen = set(GENERATED)
    folders: set[str] = set()
    hidden: set[str] = set()
    for name in reversed(layers):
        hidden_below: set[str] = set()
        with tarfile.open(fileobj=archive.extractfile(name)) as layer:
            for entry in layer:
                path = entry.name.removeprefix("./").strip("/")
                folder, _, leaf = path.rpartition("/")
                if ".." in path.split("/"):
                    raise MissingInputError(f"{entry.name} in layer {name} leads out of the image; build it again")
                if leaf == OPAQUE:
                    hidden_below.add(folder)
                elif leaf.startswith(WHITEOUT):
                    hidden_below.add(f"{folder}/{leaf.removeprefix(WHITEOUT)}".lstrip("/"))
                elif path and path not in seen and not _lies_under(path, hidden):
                    seen.add(path)
                    if not entry.isdir():
                        if path in folders:
                            continue  # a layer above made a folder of it
                        hidden_below.add(path)
                    while folder and folder not in folders:
                        folders.add(folder)
                        folder = folder.rpartition("/")[0]
                    yield _as_entry(layer, entry, path)
        hidden |= hidden_below


def _as_entry(layer: tarfile.TarFile, entry: tarfile.TarInfo, path: str) -> tuple[tarfile.TarInfo, IO[bytes] | None]:
    """One entry as it goes into the merged tar. A hard link becomes a file: its other name may be hidden above."""
    content = layer.extractfile(entry) if entry.isreg() or entry.islnk() else None
    attributes = {key: value for key, value in entry.pax_headers.items() if key.startswith("SCHILY.xattr.")}
    whole = layer.getmember(entry.linkname) if entry.islnk() else entry
    changed = whole.replace(name=path, deep=False)
    changed.pax_headers = attributes
    if content is not None:
        changed.type = tarfile.REGTYPE  # a sparse file is written with its holes filled
    return changed, content


def _lies_under(path: str, folders: set[str]) -> bool:
    """Whether the path or a folder above it is among ``folders``; the empty name is the root."""
    while path and path not in folders:
        path = path.rpartition("/")[0]
    return path in folders


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise KeyError(f"{name} is not a file")
    return member.read()
