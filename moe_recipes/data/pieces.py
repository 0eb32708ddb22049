"""Tokenized rows -> pieces of at most ``seq_len`` tokens, by ``data.long_rows``. Everything left out is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_recipes.config.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """``start`` and ``length`` int64 ``[pieces]``: runs of the token array, none longer than ``seq_len``."""

    start: np.ndarray
    length: np.ndarray
    label_tokens: int
    rows_split: int
    rows_truncated: int
    rows_skipped: int
    rows_without_labels: int


def cut_rows(
    arrays: dict[str, np.ndarray],
    chosen: np.ndarray,
    *,
    seq_len: int,
    long_rows: str,
    sources: list[dict[str, str]],
) -> Pieces:
    """The pieces of the chosen rows, in their order.

    A split text loses the label of each later part's first token, since its context is in another row.

    Args:
        arrays: of a token cache, see ``tokens.ARRAYS``.
        chosen: int ``[n]``, row numbers.
    Raises:
        DataError: a row is too long and ``long_rows`` does not say what to do with it.
    """
    length = arrays["doc_length"][chosen]
    start = (np.cumsum(arrays["doc_length"]) - arrays["doc_length"])[chosen]
    is_long = length > seq_len
    num_long = int(is_long.sum())
    is_text = arrays["doc_is_text"][chosen] != 0
    refused = is_long if long_rows == "error" else is_long & ~is_text if long_rows == "split" else is_long & False
    if refused.any():
        raise DataError(_too_long(arrays, chosen[refused], seq_len=seq_len, long_rows=long_rows, sources=sources))
    if long_rows == "skip":
        start, length = start[~is_long], length[~is_long]
    elif long_rows == "truncate":
        length = np.minimum(length, seq_len)
    elif long_rows == "split":
        start, length = _split(start, length, seq_len)
    labels = _labels(arrays["mask"], start, length)
    # Rows that are whole have labels; only a cut can have taken all of them.
    empty = (labels == 0) & is_long if long_rows == "truncate" else np.zeros(len(start), bool)
    return Pieces(
        start=start[~empty],
        length=length[~empty],
        label_tokens=int(labels.sum()),
        rows_split=num_long if long_rows == "split" else 0,
        rows_truncated=num_long - int(empty.sum()) if long_rows == "truncate" else 0,
        rows_skipped=num_long if long_rows == "skip" else 0,
        rows_without_labels=int(empty.sum()),
    )


def _too_long(
    arrays: dict[str, np.ndarray], rows: np.ndarray, *, seq_len: int, long_rows: str, sources: list[dict[str, Any]]
) -> str:
    first = rows[0]
    name = sources[int(arrays["doc_source"][first])]["name"]
    line = int(arrays["doc_line"][first])
    where = f"{name}:{line}" if name.endswith((".jsonl", ".jsonl.gz")) else f"{name} row {line}"
    lengths = arrays["doc_length"]
    kind = "chats, which data.long_rows=split cannot cut, are" if long_rows == "split" else "rows are"
    others = "truncate|skip" if long_rows == "split" else "split|truncate|skip"
    return (
        f"{where}: {lengths[first]:,} tokens do not fit into data.seq_len={seq_len}; {len(rows):,} {kind} too long, the"
        f" longest has {lengths[rows].max():,}; raise data.seq_len or set data.long_rows: {others}"
    )


def _split(start: np.ndarray, length: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Every run cut into runs of ``seq_len`` and a rest; an empty run stays one empty run."""
    parts = np.maximum(-(-length // seq_len), 1)
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    new_start = np.repeat(start, parts) + part * seq_len
    return new_start, np.minimum(np.repeat(start + length, parts) - new_start, seq_len)


def _labels(mask: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 ``[pieces]``: learned tokens of each piece that have a token before them to be predicted from."""
    out = np.zeros(len(start), np.int64)
    several = np.flatnonzero(length > 1)
    if len(several):
        # reduceat sums from each index to the next: the even entries are the wanted sums, the odd ones lie between.
        first, last = start[several] + 1, start[several] + length[several]
        bounds = np.stack([first, last], axis=1).reshape(-1)
        if bounds[-1] == len(mask):
            bounds = bounds[:-1]
        out[several] = np.add.reduceat(mask, bounds, dtype=np.int64)[::2]
    return out
