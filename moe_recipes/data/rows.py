"""Data files -> rows, each with the place that an error message can name."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_recipes.config.errors import DataError, EnvironmentMismatchError, MissingInputError, first_line
from moe_recipes.data.shapes import ROW_KEYS, RowProblem

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, or one split of a Hugging Face data set."""

    name: str
    """The path, or ``hf:ID:SPLIT``, as messages show it."""

    kind: Literal["jsonl", "parquet", "hf"]
    dataset: Any = None
    """The loaded ``datasets.Dataset``; only with kind ``hf``."""

    def where(self, line: int) -> str:
        """``line`` counts from 1: a line of a JSONL file, else a row."""
        return f"{self.name}:{line}" if self.kind == "jsonl" else f"{self.name} row {line}"


def find_sources(entries: Sequence[str], *, key: str, revision: str | None = None) -> list[Source]:
    """The sources that a recipe's entries name, in the entries' order; files of a folder or glob are sorted by path.

    Args:
        entries: files, folders (searched to any depth), globs, ``hf:ID`` or ``hf:ID:SPLIT``.
        key: the recipe key that holds the entries, for messages.
        revision: commit of Hugging Face data sets.
    Raises:
        MissingInputError: an entry leads to no file or data set.
        DataError: a file has a suffix that is not read, or a data set is damaged.
        EnvironmentMismatchError: ``datasets`` is needed and not installed.
    """
    sources: list[Source] = []
    for entry in entries:
        if entry.startswith("hf:"):
            sources.append(_open_hf(entry, key=key, revision=revision))
        else:
            sources.extend(_file_source(path, key=key) for path in _paths_of(entry, key=key))
    return sources


def _paths_of(entry: str, *, key: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file() and not p.name.startswith(".")]
        if not found:
            raise MissingInputError(f"{key}: the folder {entry} holds no {', '.join(SUFFIXES)} file")
        return sorted(found)
    if glob.has_magic(entry):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise MissingInputError(f"{key}: no file matches {entry}")
        return sorted(found)
    raise MissingInputError(f"{key}: {entry} does not exist (looked in {Path.cwd()})")


def _file_source(path: Path, *, key: str) -> Source:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return Source(name=str(path), kind="jsonl")
    if path.name.endswith(".parquet"):
        return Source(name=str(path), kind="parquet")
    known = ", ".join(SUFFIXES)
    raise DataError(f"{key}: {path} is not one of {known}; write one JSON object a line into a .jsonl file")


def _open_hf(entry: str, *, key: str, revision: str | None) -> Source:
    identifier, _, split = entry.removeprefix("hf:").partition(":")
    split = split or "train"
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentMismatchError(
            f"{key}: {entry} needs the datasets package; run `pip install datasets`"
        ) from error
    try:
        dataset = datasets.load_dataset(identifier, split=split, revision=revision)
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"{key}: {entry} is damaged: {first_line(error.__cause__ or error)}; fetch it again") from error
    except (OSError, ValueError) as error:
        reason = first_line(error)
        place = f"split {split!r}, revision {revision}"
        raise MissingInputError(f"{key}: cannot load {entry} ({place}): {reason}") from error
    return Source(name=f"hf:{identifier}:{split}", kind="hf", dataset=dataset)


def content_hash(source: Source) -> str:
    """Hex hash of what the source holds. Reads a file once, whole (about 1 GB/s); no text is parsed.

    Raises:
        MissingInputError: the file cannot be read.
    """
    if source.kind == "hf":
        return f"hf-{source.dataset._fingerprint}"
    try:
        with open(source.name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MissingInputError(f"{source.name} cannot be read: {error.strerror}") from error


def read_rows(source: Source) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    """``(line, row)`` for every row, or ``(line, RowProblem)`` where the row cannot be read. Blank lines are no rows.

    Raises:
        DataError: the file as a whole is damaged.
        MissingInputError: the file cannot be read.
        EnvironmentMismatchError: a Parquet file without ``pyarrow``.
    """
    if source.kind == "jsonl":
        return _read_jsonl(source)
    if source.kind == "parquet":
        return _read_parquet(source)
    columns = _known_columns(source, source.dataset.column_names)
    return enumerate(source.dataset.select_columns(columns), start=1)


def _read_jsonl(source: Source) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    opener = gzip.open if source.name.endswith(".gz") else open
    line = 0
    try:
        with opener(source.name, "rb") as file:
            for line, raw in enumerate(file, start=1):
                stripped = (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).strip()
                if stripped:
                    yield line, _parse_line(stripped)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source.where(line + 1)}: the gzip file is damaged or cut short; copy it again") from error
    except OSError as error:
        raise MissingInputError(f"{source.name} cannot be read: {error.strerror}") from error


def _parse_line(raw: bytes) -> dict[str, Any] | RowProblem:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem(f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowProblem(f"invalid JSON at column {error.colno} ({error.msg}); every line must be one JSON object")
    except RecursionError:
        return RowProblem("the JSON is nested too deeply")
    if not isinstance(row, dict):
        return RowProblem(f"the line is a JSON {type(row).__name__}, not an object")
    return row


def _read_parquet(source: Source) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentMismatchError(f"{source.name} needs the pyarrow package; run `pip install pyarrow`") from error
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(source.name) as file:
            columns = _known_columns(source, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except pyarrow.ArrowException as error:
        reason = first_line(error)
        raise DataError(f"{source.where(line + 1)}: the Parquet file is damaged: {reason}; copy it again") from error
    except OSError as error:
        raise MissingInputError(f"{source.name} cannot be read: {error}") from error


def _known_columns(source: Source, names: Sequence[str]) -> list[str]:
    columns = [name for name in names if name in ROW_KEYS]
    if not columns:
        raise DataError(
            f"{source.where(1)}: columns are {', '.join(names)}; needed: messages, or prompt and completion, or text"
        )
    return columns
