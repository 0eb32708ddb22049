"""Data files -> the token cache: every row as token ids and a loss mask, whatever the packing is later."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_recipes.config.errors import DataError
from moe_recipes.config.recipe import Data
from moe_recipes.data.cache import META, GrowingArray, key_of, new_folder, read_folder
from moe_recipes.data.chat import Document, Encoder
from moe_recipes.data.rows import Source, content_hash, read_rows
from moe_recipes.data.shapes import Example, RowProblem, Text, num_characters, parse_row, row_hash, shape_of

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the same text would give other tokens or masks."""

BATCH_ROWS = 256
BATCH_CHARACTERS = 1 << 20
PROGRESS_EVERY_S = 5.0

ARRAYS = {
    "tokens": np.int32,  # [all tokens]
    "mask": np.uint8,  # [all tokens]
    "doc_length": np.int64,  # [rows], tokens of each row
    "doc_source": np.int32,  # [rows], index into meta.json's sources
    "doc_line": np.int64,  # [rows]
    "doc_is_text": np.uint8,  # [rows], 1 where the row may be split
    "doc_hash": np.uint64,  # [rows], of the row's content
}


@dataclass(frozen=True, kw_only=True)
class _Row:
    source: int
    line: int
    example: Example
    hash: int


class _Problems:
    """The first bad row and the number of all."""

    def __init__(self) -> None:
        self.first = ""
        self.count = 0

    def add(self, where: str, problem: RowProblem) -> None:
        self.first = self.first or f"{where}: {problem}"
        self.count += 1

    def raise_if_any(self) -> None:
        if self.count:
            more = f" ({self.count:,} rows are bad; this is the first)" if self.count > 1 else ""
            raise DataError(self.first + more)


def tokenize_sources(
    sources: list[Source], *, data: Data, key: str, tokenizer: Any, tokenizer_hash: str, cache_dir: Path
) -> Path:
    """The folder of the token cache for these sources, made if it is not there. Called by the main rank only.

    A cache that is there costs one reading of the files for their hash; no row is parsed.

    Args:
        key: the recipe key of the sources, for messages.
        tokenizer_hash: stands for the tokenizer's files; the chat template is hashed besides.
    Raises:
        DataError: a row cannot be learned from, or there is no row.
        MissingInputError, EnvironmentMismatchError, CannotWriteError: see ``rows`` and ``cache``.
    """
    hashes = [content_hash(source) for source in sources]
    settings = [VERSION, hashes, tokenizer_hash, tokenizer.chat_template, data.format, data.loss_on]
    folder = cache_dir / f"tokens-{key_of(*settings)}"
    if folder.is_dir():
        log.info("%s: token cache %s", key, folder)
        return folder
    encoder = Encoder(tokenizer, loss_on=data.loss_on)
    with new_folder(folder) as temporary:
        digest = hashlib.sha256()
        with ExitStack() as files:
            arrays = {
                name: files.enter_context(closing(GrowingArray(temporary / f"{name}.npy", dtype)))
                for name, dtype in ARRAYS.items()
            }
            max_token = _write_documents(_documents(sources, encoder, shape=data.format, key=key), arrays, digest)
        if not arrays["doc_length"].count:
            raise DataError(f"{key}: no row in {', '.join(source.name for source in sources) or 'an empty list'}")
        meta = {
            "lengths": {name: array.count for name, array in arrays.items()},
            "sources": [{"name": source.name, "hash": hash_} for source, hash_ in zip(sources, hashes, strict=True)],
            "max_token": max_token,
            "content_hash": digest.hexdigest(),
        }
        (temporary / META).write_text(json.dumps(meta, indent=1) + "\n")
    return folder


def _documents(sources: list[Source], encoder: Encoder, *, shape: str, key: str) -> Iterator[tuple[_Row, Document]]:
    """Every row with its tokens, in order. After the first bad row the rest is only checked, to count the bad ones."""
    problems = _Problems()
    started = last_shown = time.monotonic()
    num_rows = num_tokens = 0
    for batch in _batches(_examples(sources, shape=shape, problems=problems)):
        num_rows += len(batch)
        for row, document in zip(batch, encoder.encode([row.example for row in batch]), strict=True):
            if isinstance(document, RowProblem):
                problems.add(sources[row.source].where(row.line), document)
            else:
                num_tokens += len(document.ids)
                if not problems.count:
                    yield row, document
        if time.monotonic() - last_shown > PROGRESS_EVERY_S:
            last_shown = time.monotonic()
            log.info("%s: %s rows, %s tokens, %.0f s", key, f"{num_rows:,}", f"{num_tokens:,}", last_shown - started)
    problems.raise_if_any()
    elapsed = time.monotonic() - started
    log.info("%s: tokenized %s rows, %s tokens in %.1f s", key, f"{num_rows:,}", f"{num_tokens:,}", elapsed)


def _examples(sources: list[Source], *, shape: str, problems: _Problems) -> Iterator[_Row]:
    for index, source in enumerate(sources):
        shape_of_file = None
        for line, row in read_rows(source):
            try:
                if isinstance(row, RowProblem):
                    raise row
                shape_of_row = shape_of(row, shape=shape)
                shape_of_file = shape_of_file or shape_of_row
                if shape_of_row != shape_of_file:
                    mixed = f"a {shape_of_row} row in a file of {shape_of_file} rows"
                    raise RowProblem(f"{mixed}; one file holds one shape, so split the file")
                example = parse_row(row, shape=shape_of_row)
                parsed = _Row(source=index, line=line, example=example, hash=row_hash(example))
            except RowProblem as problem:
                problems.add(source.where(line), problem)
            else:
                yield parsed


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Lists of rows, small enough that offsets of a batch of books still fit in memory."""
    batch: list[_Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += num_characters(row.example)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_documents(documents: Iterable[tuple[_Row, Document]], arrays: dict[str, GrowingArray], digest: Any) -> int:
    """Append every document to the arrays and the digest; the largest token id, or -1."""
    max_token = -1
    for row, document in documents:
        arrays["tokens"].append(document.ids)
        arrays["mask"].append(document.mask)
        is_text = isinstance(row.example, Text)
        facts = (len(document.ids), row.source, row.line, is_text, row.hash)
        for name, value in zip(list(ARRAYS)[2:], facts, strict=True):
            arrays[name].append(np.array([value], ARRAYS[name]))
        digest.update(np.int64(len(document.ids)).tobytes() + document.ids.tobytes() + document.mask.tobytes())
        max_token = max(max_token, int(document.ids.max(initial=-1)))
    return max_token


def read_tokens(folder: Path, *, vocab_size: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """``(arrays, meta)`` of a token cache, memory-mapped.

    Raises:
        DataError: a token has no row in the model's embedding, or the cache is damaged.
        MissingInputError: there is no such folder.
    """
    arrays, meta = read_folder(folder)
    if meta["max_token"] >= vocab_size:
        raise DataError(
            f"{meta['sources'][0]['name']}: the tokenizer gives token {meta['max_token']}, but the model's vocab_size"
            f" is {vocab_size}; set model.tokenizer to the tokenizer of this model"
        )
    return arrays, meta
