"""The verb ``image``: make the .sqsh of a container once, and check it.

``image import SOURCE x.sqsh`` leaves ``x.sqsh`` and beside it ``x.sqsh.json``, which says where the image came from and
what its bytes hash to. All nodes start from that one file; ``image verify`` and preflight compare it with the record.
SOURCE is what enroot imports (``docker://``, ``dockerd://``, ``podman://``), a folder with a root file system, or an
archive of `docker save`; the last two need mksquashfs and no enroot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import moe_recipes
from moe_recipes.config.errors import (
    EXIT_OK,
    CannotWriteError,
    EnvironmentMismatchError,
    MissingInputError,
    RecipeError,
    did_you_mean,
)
from moe_recipes.launch.arguments import add_json
from moe_recipes.launch.image_archive import read_archive, write_rootfs

SCHEMA_VERSION = 1
ENROOT_SCHEMES = ("docker", "dockerd", "podman")
SQUASH_OPTIONS = ("-comp", "zstd", "-Xcompression-level", "3", "-all-root", "-noappend", "-quiet", "-no-progress")
SQUASHFS_MAGIC = b"hsqs"
PINNED = re.compile(r"@(sha256:[0-9a-f]{64})$")


@dataclass(frozen=True)
class ImageRecord:
    """What ``x.sqsh.json`` says of ``x.sqsh``."""

    sha256: str
    """Of the .sqsh file, in hex."""

    size_bytes: int
    source: str
    """The URI, folder or archive, without a user's name."""

    digest: str | None
    """``sha256:...`` of the source: a registry's manifest, or an archive's configuration. None where there is none."""

    imported: str
    """UTC, ISO 8601."""

    tool: str
    moe_recipes: str
    labels: dict[str, str] = field(default_factory=dict)
    """OCI labels, where the source is an archive."""

    schema_version: int = SCHEMA_VERSION


def record_path(image: Path) -> Path:
    """Where the record of an image lies."""
    return image.with_name(f"{image.name}.json")


def sha256_of(path: Path) -> str:
    """Hash of a file in hex. Reads it whole: about a second for each GiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(image: Path) -> ImageRecord:
    """The record of an image. Raises ``MissingInputError`` where the image or a readable record is not there."""
    if not image.is_file():
        near = [path.name for path in image.parent.glob("*.sqsh")] if image.parent.is_dir() else []
        hint = did_you_mean(image.name, near) if near else f"; make it: moe-recipes image import SOURCE {image}"
        raise MissingInputError(f"no image {image}{hint}")
    path = record_path(image)
    try:
        data = json.loads(path.read_text())
        names = {part.name for part in fields(ImageRecord)}
        record = ImageRecord(**{name: value for name, value in data.items() if name in names})
    except FileNotFoundError:
        raise MissingInputError(
            f"{image} has no record {path.name}; bring it from where the image was made, or import under another name"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise MissingInputError(f"{path} is not a record of an image: {error}; import the image again") from error
    return record


def verify_image(image: Path) -> ImageRecord:
    """Compare an image with its record, byte by byte.

    Raises ``MissingInputError`` where one of both is not there, ``EnvironmentMismatchError`` where they differ.
    """
    record = read_record(image)
    size = image.stat().st_size
    mend = f"restore it, or remove it and its record and import {record.source} again"
    if size != record.size_bytes:
        raise EnvironmentMismatchError(f"{image} has {size} bytes and its record says {record.size_bytes}; {mend}")
    if (now := sha256_of(image)) != record.sha256:
        raise EnvironmentMismatchError(f"{image} hashes to {now[:12]} and its record says {record.sha256[:12]}; {mend}")
    return record


def import_image(source: str, image: Path) -> tuple[ImageRecord, bool]:
    """Make ``image`` and its record from a source. Returns the record, and whether anything was written.

    The same source again, known by its digest, is left as it is once its bytes are checked.

    Raises ``CannotWriteError`` where another image or another import has the name, ``MissingInputError`` where the
    source is not there, ``EnvironmentMismatchError`` where enroot or mksquashfs is missing or fails.
    """
    if image.suffix != ".sqsh":
        raise RecipeError(f"{image}: the name of an image ends in .sqsh, or pyxis takes it for a name in a registry")
    if not image.parent.is_dir():
        raise MissingInputError(f"no folder {image.parent} for the image; make it first, on a disk that all nodes see")
    scheme, archive = _kind_of(source), None
    if scheme == "archive":
        archive = read_archive(Path(source))
    digest = archive.digest if archive else _registry_digest(source) if scheme == "docker" else None
    if image.exists():
        return _already_there(image, source, digest), False
    with _work_folder(image) as work:
        made = work / "image.sqsh"
        tool = _import_with_enroot(source, made) if scheme in ENROOT_SCHEMES else _squash(Path(source), made)
        record = ImageRecord(
            sha256=sha256_of(made),
            size_bytes=made.stat().st_size,
            source=_public(source),
            digest=digest,
            imported=datetime.now(UTC).isoformat(timespec="seconds"),
            tool=tool,
            moe_recipes=moe_recipes.__version__,
            labels=dict(archive.config.get("Labels") or {}) if archive else {},
        )
        _publish(made, image, record)
    return record, True


def _kind_of(source: str) -> str:
    """``docker``, ``dockerd``, ``podman``, ``folder`` or ``archive``."""
    scheme, separator, _ = source.partition("://")
    if separator:
        if scheme not in ENROOT_SCHEMES:
            raise RecipeError(f"{source}: enroot imports no {scheme}://{did_you_mean(scheme, ENROOT_SCHEMES)}")
        return scheme
    path = Path(source)
    if path.is_dir():
        if not (path / "etc").is_dir() or not any((path / name).exists() for name in ("bin", "usr/bin")):
            raise MissingInputError(f"{source} is not a root file system: it has no etc and bin or usr/bin in it")
        return "folder"
    if not path.is_file():
        uri = re.sub(r"^([\w.-]+\.[\w.-]+(?::\d+)?)/", r"\1#", source)  # enroot writes # after a registry's host
        named = ("/" in source or ":" in source) and not source.startswith(("/", ".", "~"))
        hint = f"; a registry's image is written docker://{uri}" if named else ""
        raise MissingInputError(f"no file or folder {source}{hint}")
    with path.open("rb") as file:
        if file.read(4) == SQUASHFS_MAGIC:
            raise RecipeError(f"{source} is a .sqsh already; copy it with its record {record_path(path).name}")
    return "archive"


def _already_there(image: Path, source: str, digest: str | None) -> ImageRecord:
    """The record of the image under that name, if it is the one that was asked for."""
    try:
        record = read_record(image)
    except MissingInputError as error:
        raise CannotWriteError(f"{image} is there and is not known: {error}; choose another name") from error
    if digest is None or digest != record.digest:
        what = f"an image of {record.source} ({record.digest or 'without a digest'}, imported {record.imported})"
        wanted = f"not {_public(source)} ({digest})" if digest else f"and {_public(source)} has no digest to compare"
        raise CannotWriteError(f"{image} is there: {what}, {wanted}; choose another name, running jobs may use it")
    return verify_image(image)


@contextmanager
def _work_folder(image: Path) -> Iterator[Path]:
    """A folder beside the image that one import owns: making it is atomic, also on a network file system."""
    work = image.with_name(f"{image.name}.part")
    try:
        work.mkdir()
    except FileExistsError:
        raise CannotWriteError(
            f"{work} is there: another import is running, or one was killed; remove it if none runs"
        ) from None
    except OSError as error:
        raise CannotWriteError(f"cannot write beside {image}: {error.strerror}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _import_with_enroot(source: str, made: Path) -> str:
    enroot = _program("enroot", "install it (github.com/NVIDIA/enroot), or import an archive of docker save")
    # A digest names one image; older releases of enroot take no tag beside it.
    uri = re.sub(r":[\w.-]+(?=@sha256:)", "", source)
    done = subprocess.run([enroot, "import", "--output", str(made), uri], stdout=sys.stderr)
    if done.returncode != 0 or not made.is_file():
        raise EnvironmentMismatchError(
            f"enroot import {_public(uri)} ended with {done.returncode}; its lines are above"
        )
    return _version_of(enroot, "version")


def _squash(source: Path, made: Path) -> str:
    """Pack a folder, or the merged layers of an archive."""
    program = _program("mksquashfs", "install squashfs-tools 4.5 or newer")
    with tempfile.TemporaryFile("w+") as said:
        if source.is_dir():
            command = [program, str(source), str(made), *SQUASH_OPTIONS]
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said).returncode
        else:
            command = [program, "-", str(made), "-tar", *SQUASH_OPTIONS]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said) as packer:
                assert packer.stdin is not None
                try:
                    with packer.stdin:
                        write_rootfs(source, read_archive(source), packer.stdin)
                except BrokenPipeError:
                    pass  # mksquashfs ended first; what it said is the cause
                except BaseException:
                    packer.kill()
                    raise
            code = packer.returncode
        if code != 0 or not made.is_file():
            said.seek(0)
            words = " ".join(said.read().split()) or "it said nothing"
            if "No space left" in words:
                raise CannotWriteError(f"{made.parent}: cannot be written: No space left on device; free space")
            raise EnvironmentMismatchError(f"mksquashfs of {source} ended with {code}: {words[-300:]}")
    return _version_of(program, "-version")


def _publish(made: Path, image: Path, record: ImageRecord) -> None:
    """Bring both files to disk under their names, the record first: an image that is there has its record."""
    text = json.dumps(asdict(record), indent=1) + "\n"
    note = made.with_name("record.json")
    note.write_text(text)
    for path in (made, note):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    os.replace(note, record_path(image))
    os.replace(made, image)


def _registry_digest(source: str) -> str | None:
    """The digest that a docker:// URI names, or that the registry gives for its tag."""
    if pinned := PINNED.search(source):
        return pinned[1]
    enroot = shutil.which("enroot")
    if enroot is None:
        return None
    done = subprocess.run([enroot, "digest", source], capture_output=True, text=True)
    found = re.search(r"sha256:[0-9a-f]{64}", done.stdout)
    return found[0] if done.returncode == 0 and found else None


def _public(source: str) -> str:
    """The source as the record has it: a URI without the user's name of ``docker://USER@REGISTRY#IMAGE``, or a path."""
    if "://" not in source:
        return str(Path(source).absolute())
    return re.sub(r"^(\w+://)[^@/#]+@(?!sha256:)", r"\1", source)


def _program(name: str, mend: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise EnvironmentMismatchError(f"{name} is not installed on this host; {mend}")
    return path


def _version_of(program: str, argument: str) -> str:
    done = subprocess.run([program, argument], capture_output=True, text=True)
    found = re.search(r"\d+\.\d+(?:\.\d+)?", done.stdout + done.stderr)
    return f"{Path(program).name} {found[0] if found else 'of unknown version'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = actions.add_parser("import", help="make a .sqsh and its record")
    made.add_argument("source", help="docker://REGISTRY#NAME@sha256:..., dockerd://, podman://, a folder or an archive")
    made.add_argument("image", type=Path, metavar="FILE.sqsh", help="the file to make, on a disk that all nodes see")
    add_json(made)
    checked = actions.add_parser("verify", help="compare a .sqsh with its record")
    checked.add_argument("image", type=Path, metavar="FILE.sqsh")
    add_json(checked)


def run(options: argparse.Namespace) -> int:
    image = options.image.absolute()
    if options.action == "import":
        record, written = import_image(options.source, image)
        said = "imported" if written else "was there already, its bytes are those of the record"
    else:
        record, said = verify_image(image), "is as its record says"
    if options.json:
        print(json.dumps({"image": str(image), **asdict(record)}))
        return EXIT_OK
    print(f"{image} {said}: sha256 {record.sha256}, {record.size_bytes / 2**20:.0f} MiB, from {record.source}")
    if record.digest is None:
        print("the source has no digest, so the record cannot say which image it was", file=sys.stderr)
    return EXIT_OK
