"""``open_data``: from the recipe's ``data`` section to rows that ``Batches`` can read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_recipes.config.errors import CannotWriteError, DataError
from moe_recipes.config.recipe import Data
from moe_recipes.data.cache import META, key_of, new_folder, read_folder, read_opened, write_arrays, write_json
from moe_recipes.data.loader import PackedRows, RandomRows
from moe_recipes.data.packing import one_each, pack
from moe_recipes.data.pieces import Pieces, cut_rows
from moe_recipes.data.rows import find_sources
from moe_recipes.data.tokens import read_tokens, tokenize_sources

VERSION = 1
"""Raise it when the same tokens would give other packed rows."""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What became of the rows of one split. Rows are the files' rows, packed rows the model's."""

    rows: int
    rows_split: int
    rows_truncated: int
    rows_skipped: int
    """Longer than ``seq_len``, with ``long_rows: skip``."""

    rows_without_labels: int
    """Left out because the cut of ``long_rows: truncate`` took every label."""

    tokens: int
    """Tokens that are trained on or predicted from; padding is not counted."""

    label_tokens: int
    packed_rows: int
    fill_fraction: float
    """Share of the packed rows' positions that hold tokens."""

    fingerprint: str
    sources: tuple[dict[str, str], ...]
    """``name`` and ``hash`` of each source."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """For the run's manifest. ``asdict`` gives plain JSON."""

    format: str
    train: SplitReport | None
    """None with ``random_tokens``."""

    validation: SplitReport | None


def open_data(
    data: Data,
    *,
    tokenizer: Any,
    tokenizer_hash: str,
    vocab_size: int,
    cache_dir: Path,
    seed: int,
    is_main: bool,
    barrier: Callable[[], None],
) -> tuple[PackedRows | RandomRows, PackedRows | RandomRows | None, DataReport]:
    """Training rows, held-out rows if the recipe asks for some, and the report. Every rank calls this.

    The main rank reads the text, tokenizes and packs what the cache does not hold yet; the other ranks wait at the
    barrier and memory-map what it wrote, so they need the cache folder and none of the data files.

    Args:
        tokenizer: a Hugging Face fast tokenizer; not used with ``random_tokens``.
        tokenizer_hash: hash of the tokenizer's files.
        vocab_size: rows of the model's embedding.
        cache_dir: on a disk that all hosts share.
        seed: of random tokens; nothing else depends on it.
        is_main: true on one rank.
        barrier: called once on every rank, also when the main rank fails.
    Raises:
        DataError: the data cannot be learned from as asked.
        MissingInputError: a data file is not there; on the other ranks: the main rank wrote no cache.
        EnvironmentMismatchError, CannotWriteError: a package is missing; the cache cannot be written.
    """
    if data.format == "random_tokens":
        barrier()
        rows = RandomRows(vocab_size=vocab_size, seq_len=data.seq_len, seed=seed)
        held_out = RandomRows(vocab_size=vocab_size, seq_len=data.seq_len, seed=seed + (1 << 63))
        report = DataReport(format=data.format, train=None, validation=None)
        return rows, held_out if data.validation_fraction else None, report
    asked = [data.train, data.validation, data.validation_fraction, data.revision, data.format, data.seq_len]
    asked += [data.loss_on, data.long_rows, data.packing, tokenizer_hash, tokenizer.chat_template]
    opened_path = cache_dir / f"opened-{key_of(VERSION, *asked)}.json"
    if is_main:
        try:
            _prepare(data, tokenizer, tokenizer_hash, vocab_size, cache_dir, opened_path)
        except BaseException:
            with suppress(OSError):
                opened_path.unlink()
            raise
        finally:
            barrier()
    else:
        barrier()
    opened = read_opened(opened_path)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < vocab_size), 0)
    splits: list[Any] = []
    for name in ("train", "validation"):
        splits.append(_open_split(cache_dir, opened[name], data, vocab_size, pad_id) if opened[name] else (None, None))
    (train, train_report), (validation, validation_report) = splits
    return train, validation, DataReport(format=data.format, train=train_report, validation=validation_report)


def _prepare(
    data: Data, tokenizer: Any, tokenizer_hash: str, vocab_size: int, cache_dir: Path, opened_path: Path
) -> None:
    """The main rank's part: token caches, packings, and the file that names them."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{cache_dir}: {error.strerror}; set data.cache_dir") from error

    def tokens_of(entries: tuple[str, ...], key: str) -> Path:
        sources = find_sources(entries, key=key, revision=data.revision)
        folder = tokenize_sources(
            sources, data=data, key=key, tokenizer=tokenizer, tokenizer_hash=tokenizer_hash, cache_dir=cache_dir
        )
        read_tokens(folder, vocab_size=vocab_size)
        return folder

    train = tokens_of(data.train, "data.train")
    fraction = data.validation_fraction
    opened = {"train": _pack_split(train, data, cache_dir, held_out=False if fraction else None), "validation": None}
    if data.validation:
        validation = tokens_of(data.validation, "data.validation")
        opened["validation"] = _pack_split(validation, data, cache_dir, held_out=None)
    elif fraction:
        opened["validation"] = _pack_split(train, data, cache_dir, held_out=True)
    write_json(opened_path, opened)


def _pack_split(tokens_folder: Path, data: Data, cache_dir: Path, *, held_out: bool | None) -> dict[str, str]:
    """Folder names of the tokens and of the packed rows of one split, packed if they are not there.

    Args:
        held_out: which side of ``validation_fraction``; None for every row.
    Raises:
        DataError: a row is too long, or no row is left.
    """
    side = [held_out, data.validation_fraction if held_out is not None else 0.0]
    settings = [VERSION, tokens_folder.name, side, data.seq_len, data.long_rows, data.packing]
    folder = cache_dir / f"packed-{key_of(*settings)}"
    names = {"tokens": tokens_folder.name, "packed": folder.name}
    if folder.is_dir():
        return names
    arrays, meta = read_folder(tokens_folder)
    chosen = _rows_of_side(arrays["doc_hash"], data.validation_fraction, held_out)
    pieces = cut_rows(arrays, chosen, seq_len=data.seq_len, long_rows=data.long_rows, sources=meta["sources"])
    if not len(pieces.start):
        raise DataError(
            f"no row is left {'for validation' if held_out else 'to train on'} of {len(chosen):,} chosen and"
            f" {len(arrays['doc_hash']):,} read; change data.validation_fraction, data.long_rows or the files"
        )
    order, row_offsets = pack(pieces.length, seq_len=data.seq_len) if data.packing else one_each(pieces.length)
    packed = {"piece_start": pieces.start[order], "piece_length": pieces.length[order], "row_offsets": row_offsets}
    fingerprint = key_of(VERSION, meta["content_hash"], side, data.seq_len, data.long_rows, data.packing)
    report = _report(pieces, num_rows=len(chosen), packed_rows=len(row_offsets) - 1, seq_len=data.seq_len)
    with new_folder(folder) as temporary:
        write_arrays(temporary, packed)
        lengths = {name: len(array) for name, array in packed.items()}
        write_json(temporary / META, {"lengths": lengths, "report": report, "fingerprint": fingerprint})
    return names


def _rows_of_side(hashes: np.ndarray, fraction: float, held_out: bool | None) -> np.ndarray:
    """Row numbers. A row's side depends on its own content only: added or moved rows change no other row's side."""
    if held_out is None:
        return np.arange(len(hashes))
    return np.flatnonzero((hashes.astype(np.float64) / 2.0**64 < fraction) == held_out)


def _report(pieces: Pieces, *, num_rows: int, packed_rows: int, seq_len: int) -> dict[str, Any]:
    tokens = int(pieces.length.sum())
    return {
        "rows": num_rows,
        "rows_split": pieces.rows_split,
        "rows_truncated": pieces.rows_truncated,
        "rows_skipped": pieces.rows_skipped,
        "rows_without_labels": pieces.rows_without_labels,
        "tokens": tokens,
        "label_tokens": pieces.label_tokens,
        "packed_rows": packed_rows,
        "fill_fraction": tokens / (packed_rows * seq_len),
    }


def _open_split(
    cache_dir: Path, names: dict[str, str], data: Data, vocab_size: int, pad_id: int
) -> tuple[PackedRows, SplitReport]:
    tokens, tokens_meta = read_tokens(cache_dir / names["tokens"], vocab_size=vocab_size)
    packed, packed_meta = read_folder(cache_dir / names["packed"])
    rows = PackedRows(
        tokens=tokens["tokens"],
        mask=tokens["mask"],
        piece_start=packed["piece_start"],
        piece_length=packed["piece_length"],
        row_offsets=packed["row_offsets"],
        seq_len=data.seq_len,
        pad_id=pad_id,
        fingerprint=packed_meta["fingerprint"],
    )
    report = SplitReport(**packed_meta["report"], fingerprint=rows.fingerprint, sources=tuple(tokens_meta["sources"]))
    return rows, report
