"""The rows of the proof's one step: ragged documents that share rows, and a microbatch that all goes to few experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_recipes.data.loader import IGNORE, Batch

SEQ_LEN = 32
ROWS_PER_MICROBATCH = 8
"""Over all ranks: 1, 2, 4 and 8 ranks take 8, 4, 2 and 1 of them."""

NUM_MICROBATCHES = 3
NUM_ROWS = ROWS_PER_MICROBATCH * NUM_MICROBATCHES
ONE_TOKEN_FROM = ROWS_PER_MICROBATCH * (NUM_MICROBATCHES - 1)
"""From this row on a row is one token over and over. Where every token of a row is alike, attention cannot tell them
apart and the router sends them all to the same experts: the others get nothing, and a limit on an expert shows."""

NO_LABELS = (2, 3, 10, 11)
ONE_LABEL = 5


@dataclass(frozen=True, kw_only=True)
class Document:
    """One training example inside a packed row."""

    row: int
    start: int
    input_ids: Tensor
    """int64 ``[n]``."""

    learned: Tensor
    """bool ``[n]``: tokens that carry loss; never the first, which nothing predicts."""

    @property
    def end(self) -> int:
        return self.start + len(self.input_ids)


def make_documents(*, vocab_size: int, packed: bool) -> list[Document]:
    """The documents of the step, the same at every call. Some rows and ranks carry no label beside full ones.

    Args:
        packed: three of four rows hold three documents; otherwise each row is one.
    """
    random = np.random.default_rng(0)
    found = []
    for row in range(NUM_ROWS):
        several = packed and row % 4 != 0 and row < ONE_TOKEN_FROM
        cuts = sorted(random.choice(np.arange(3, SEQ_LEN - 3), size=2, replace=False)) if several else []
        for start, end in zip([0, *cuts], [*cuts, SEQ_LEN], strict=True):
            learned = torch.from_numpy(random.random(end - start) < random.random())
            learned[0] = False
            if row in NO_LABELS:
                learned[:] = False
            if row == ONE_LABEL:
                learned[:] = False
                learned[-1] = bool(end == SEQ_LEN)
            ids = torch.from_numpy(random.integers(0, vocab_size, end - start))
            if row >= ONE_TOKEN_FROM:
                ids = torch.full((end - start,), 7 % vocab_size)
                learned[-1] = True
            found.append(Document(row=row, start=int(start), input_ids=ids, learned=learned))
    return found


def batch_of(documents: Iterable[Document], rows: range) -> Batch:
    """The microbatch of these rows, as the loader would make it."""
    ids = torch.zeros(len(rows), SEQ_LEN, dtype=torch.int64)
    positions, labels = ids.clone(), torch.full_like(ids, IGNORE)
    for d in documents:
        if d.row not in rows:
            continue
        row = d.row - rows.start
        ids[row, d.start : d.end] = d.input_ids
        positions[row, d.start : d.end] = torch.arange(len(d.input_ids))
        labels[row, d.start : d.end - 1] = torch.where(d.learned, d.input_ids, IGNORE)[1:]
    return Batch(
        input_ids=ids,
        position_ids=positions,
        shift_labels=labels,
        num_label_tokens=int((labels != IGNORE).sum()),
        num_tokens=ids.numel(),
        row_ids=tuple(rows),
    )


def rank_batches(documents: Iterable[Document], *, rank: int, num_ranks: int) -> list[Batch]:
    """This rank's microbatches: row ``m * 8 + rank * B + i`` of the step is row i of microbatch m."""
    documents, size = list(documents), ROWS_PER_MICROBATCH // num_ranks
    firsts = [micro * ROWS_PER_MICROBATCH + rank * size for micro in range(NUM_MICROBATCHES)]
    return [batch_of(documents, range(first, first + size)) for first in firsts]
