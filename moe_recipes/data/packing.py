"""Documents -> rows of ``seq_len`` tokens. No document is cut here, dropped or split over two rows."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, *, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: longest documents first, each into the fullest row that still holds it.

    The free sizes of open rows are the set bits of one integer, so that the best fit is one shift and one lowest bit:
    about 1 us a document at 4k tokens.

    Args:
        lengths: int ``[n]``, each in 1..seq_len.
    Returns:
        ``order`` int64 ``[n]``: document numbers, row after row; ``row_offsets`` int64 ``[rows + 1]``: where each row
        starts in ``order``. Both depend on ``lengths`` alone.
    """
    by_length = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    open_rows: dict[int, list[int]] = {}
    free_sizes = 0
    num_rows = 0
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        at_least = free_sizes >> length
        if at_least:
            free = length + (at_least & -at_least).bit_length() - 1
            rows = open_rows[free]
            row = rows.pop()
            if not rows:
                free_sizes ^= 1 << free
        else:
            free, row = seq_len, num_rows
            num_rows += 1
        row_of[document] = row
        left = free - length
        if left:
            rows = open_rows.setdefault(left, [])
            if not rows:
                free_sizes |= 1 << left
            rows.append(row)
    order = by_length[np.argsort(row_of[by_length], kind="stable")]
    counts = np.bincount(row_of, minlength=num_rows)
    return order.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def one_each(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One document a row, in order; the same form as ``pack``."""
    return np.arange(len(lengths), dtype=np.int64), np.arange(len(lengths) + 1, dtype=np.int64)
