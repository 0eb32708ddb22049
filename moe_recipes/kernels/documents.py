"""The documents of packed rows, as runs of tokens that a kernel may work on one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring tokens that see each other, in some rows: all rows at once where rows are one document each."""

    rows: slice
    start: int
    end: int


def document_runs(seq_idx_BS: Tensor | None, shape: tuple[int, int]) -> tuple[Run, ...]:
    """The documents of a batch.

    Args:
        seq_idx_BS: integers that change where a document ends; None where every row is one document. On a GPU this
            waits for the device.
        shape: batch size and row length.
    """
    num_rows, length = shape
    if seq_idx_BS is None:
        return (Run(rows=slice(0, num_rows), start=0, end=length),)
    runs = []
    for row, index_S in enumerate(seq_idx_BS):
        end = 0
        for count in torch.unique_consecutive(index_S, return_counts=True)[1].tolist():
            runs.append(Run(rows=slice(row, row + 1), start=end, end=end + count))
            end += count
    return tuple(runs)
