"""One repository of the Hugging Face hub in the local cache: fetch it at a commit, check every size and every hash.

What the hub says about the files is kept beside them, in ``<cache>/models--ORG--NAME/moe_recipes/COMMIT.json``, so that
the same check runs where there is no network. Files under git have the hash of a git blob (SHA-1), large ones SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from moe_recipes.config.errors import (
    CannotWriteError,
    CorruptCheckpointError,
    EnvironmentMismatchError,
    InfrastructureError,
    MissingInputError,
    first_line,
)
from moe_recipes.config.run_folder import write_json

CHUNK_BYTES = 1 << 22
HASH_THREADS = 8


@dataclass(frozen=True)
class HubFile:
    """A file as the hub knows it."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None
    """Of a file that is not in large file storage; then there is no ``sha256``."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    kind: str
    """``model`` or ``dataset``."""

    name: str
    commit: str
    skip: tuple[str, ...] = ()
    """Patterns of files that are not needed."""

    needs: str = ""
    """How the name of at least one file must end."""

    def __str__(self) -> str:
        return f"{self.name} at {self.commit}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps it."""
        return cache_folder() / f"{self.kind}s--{self.name.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    @property
    def record(self) -> Path:
        return self.folder / "moe_recipes" / f"{self.commit}.json"

    def wants(self, path: str) -> bool:
        return not any(fnmatch(path, pattern) for pattern in self.skip)


def cache_folder() -> Path:
    """The cache of huggingface_hub, as HF_HUB_CACHE and HF_HOME have it.

    Raises:
        EnvironmentMismatchError: the package is not installed.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise _no_client() from error
    return Path(constants.HF_HUB_CACHE)


def _no_client() -> EnvironmentMismatchError:
    pip = f"{sys.executable} -m pip install huggingface_hub datasets"
    return EnvironmentMismatchError(f"{sys.executable} has no huggingface_hub, which prefetch needs; run: {pip}")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the hub's errors into one line about ``what``.

    Raises:
        MissingInputError: the hub has no such repository or commit, or keeps it from this token.
        InfrastructureError: the hub did not answer as it should.
        CannotWriteError: the cache takes no more.
    """
    from huggingface_hub import errors

    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    try:
        yield
    except errors.GatedRepoError as error:
        raise MissingInputError(f"{what}: needs a token that may read it; set HF_TOKEN: {first_line(error)}") from error
    except missing as error:
        raise MissingInputError(f"{what}: the hub has no such thing, or HF_TOKEN may not see it") from error
    except errors.HfHubHTTPError as error:
        raise InfrastructureError(f"{what}: the hub answered: {first_line(error)}; try again later") from error
    except PermissionError as error:
        raise CannotWriteError(f"{error.filename}: cannot be written: {error.strerror}; set HF_HOME") from error
    except OSError as error:
        if error.errno is not None and error.filename:
            raise CannotWriteError(f"{error.filename}: cannot be written: {error.strerror}; set HF_HOME") from error
        raise InfrastructureError(f"{what}: the hub was not reached: {first_line(error)}; try again later") from error
    except Exception as error:  # its HTTP library changes between releases; ours raise MoeRecipesError
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests", "httpcore", "hf_xet"):
            raise
        raise InfrastructureError(f"{what}: the hub was not reached: {first_line(error)}; try again later") from error


def quiet_client() -> None:
    """Leave stderr to errors: no retries in words, and bars only on a terminal.

    Raises:
        EnvironmentMismatchError: this Python has no huggingface_hub, as that of `make host`.
    """
    try:
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError as error:
        raise _no_client() from error
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def newest_commit(kind: str, name: str) -> str:
    """The commit that the hub's main branch points to now."""
    from huggingface_hub import HfApi

    with hub_errors(f"{kind} {name}"):
        return str(HfApi().repo_info(name, repo_type=kind).sha)


def list_files(repository: Repository) -> list[HubFile]:
    """What the hub has at the commit, without the files that are skipped, by path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = []
    with hub_errors(f"{repository.kind} {repository}"):
        # Asked first because it fails at once; the listing tries for half a minute to reach a hub that is away.
        HfApi().repo_info(repository.name, repo_type=repository.kind, revision=repository.commit, timeout=30)
        for item in HfApi().list_repo_tree(
            repository.name, recursive=True, revision=repository.commit, repo_type=repository.kind
        ):
            if isinstance(item, RepoFile) and repository.wants(item.path):
                large = item.lfs
                found.append(
                    HubFile(
                        path=item.path,
                        size=item.size,
                        sha256=large.sha256 if large else None,
                        git_sha1=None if large else item.blob_id,
                    )
                )
    for file in found:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise CorruptCheckpointError(f"{repository}: the hub names a file outside of the repository: {file.path!r}")
    if not any(file.path.endswith(repository.needs) for file in found):
        raise MissingInputError(
            f"{repository}: has no {repository.needs} files, and no other weights are loaded; name another model.source"
        )
    return sorted(found, key=lambda file: file.path)


def fetch(repository: Repository, say: Callable[[str], None]) -> list[HubFile]:
    """Bring every wanted file into the cache and check it. A damaged one is removed and fetched once more.

    Raises:
        MissingInputError, InfrastructureError, CannotWriteError: as ``hub_errors``; also a disk that is too small.
        CorruptCheckpointError: a file is not what the hub says it is, though just fetched.
    """
    from huggingface_hub import snapshot_download

    files = list_files(repository)
    there = [file for file in files if (repository.snapshot / file.path).exists()]
    damaged = wrong_files(repository, there)
    for path, reason in damaged.items():
        say(f"{repository.name}: {path}: {reason}; fetching it again")
        _remove(repository.snapshot / path)
    missing = [file for file in files if file not in there or file.path in damaged]
    _check_space(repository, sum(file.size for file in missing))
    if missing:
        say(f"{repository.name}: fetching {len(missing)} of {len(files)} files, {size(total(missing))}")
        with hub_errors(f"{repository.kind} {repository}"):
            snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.commit,
                allow_patterns=[_literal(file.path) for file in missing],
            )
    if wrong := wrong_files(repository, missing):
        for path in wrong:
            _remove(repository.snapshot / path)
        raise CorruptCheckpointError(f"{repository}: {describe(wrong)}; removed what was wrong, run prefetch again")
    try:
        repository.record.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{repository.record}: cannot be written: {error.strerror}; set HF_HOME") from error
    write_json(repository.record, {"commit": repository.commit, "files": [vars(file) for file in files]})
    return files


def check(repository: Repository) -> list[HubFile]:
    """Check the cached files against the record of an earlier ``fetch``. Needs no network.

    Raises:
        MissingInputError: never fetched at this commit or not all of it, or files are gone.
        CorruptCheckpointError: a file or the record is damaged.
    """
    try:
        record: Mapping[str, Any] = json.loads(repository.record.read_bytes())
        files = [HubFile(**entry) for entry in record["files"]]
    except FileNotFoundError as error:
        raise MissingInputError(
            f"{repository}: was never prefetched into {cache_folder()}; run prefetch where there is a network"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{repository.record}: cannot be read; run prefetch again") from error
    files = [file for file in files if repository.wants(file.path)]
    if not any(file.path.endswith(repository.needs) for file in files):
        raise MissingInputError(
            f"{repository}: was prefetched without its {repository.needs} files; run prefetch again"
        )
    if wrong := wrong_files(repository, files):
        kind = MissingInputError if all(reason == "is missing" for reason in wrong.values()) else CorruptCheckpointError
        raise kind(f"{repository}: {describe(wrong)}; run prefetch again where there is a network")
    return files


def wrong_files(repository: Repository, files: Sequence[HubFile]) -> dict[str, str]:
    """What is wrong with each file that is not what the hub has, by path. Reads every byte, about 1 GB/s a thread."""
    with ThreadPoolExecutor(max_workers=HASH_THREADS) as pool:
        reasons = pool.map(lambda file: _what_is_wrong(repository.snapshot / file.path, file), files)
        return {file.path: reason for file, reason in zip(files, reasons, strict=True) if reason}


def _what_is_wrong(path: Path, file: HubFile) -> str | None:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != file.size:
            return f"has {num_bytes:,} bytes, the hub has {file.size:,}"
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with path.open("rb") as data:
            while chunk := data.read(CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    expected = file.sha256 or file.git_sha1
    if digest.hexdigest() != expected:
        return f"has {digest.name} {digest.hexdigest()[:12]}..., the hub has {str(expected)[:12]}..."
    return None


def _remove(path: Path) -> None:
    """Remove a file of a snapshot and the blob behind it, or the next fetch would find the same bytes again."""
    blob = path.resolve()
    for part in (path, blob):
        try:
            part.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWriteError(f"{part}: cannot be removed: {error.strerror}; run as its owner") from error


def _check_space(repository: Repository, num_bytes: int) -> None:
    place = repository.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise CannotWriteError(
            f"{repository}: {size(num_bytes)} to fetch, but {place} has {size(free)} free; free space, or set HF_HOME"
        )


def _literal(path: str) -> str:
    """A pattern that matches this path only: the hub's client takes patterns."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def describe(wrong: Mapping[str, str]) -> str:
    """The first wrong files, and how many more there are."""
    first = [f"{path} {reason}" for path, reason in list(wrong.items())[:3]]
    more = f", and {len(wrong) - 3} more files" if len(wrong) > 3 else ""
    return f"{', '.join(first)}{more}"


def total(files: Sequence[HubFile]) -> int:
    return sum(file.size for file in files)


def size(num_bytes: int) -> str:
    """Decimal units, as the hub shows them."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
