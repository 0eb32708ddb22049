"""Packed rows -> the batches of a step, as a pure function of (seed, step): a resume needs no loader state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
NUM_RANDOM_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One microbatch of this rank: CPU tensors, int64, ``[B, S]``."""

    input_ids: Tensor
    position_ids: Tensor
    """Restarts at 0 with every packed document, which is how Transformers finds the borders (call the model with
    ``use_cache=False`` and no attention mask). Padding at a row's end counts as one more document."""

    shift_labels: Tensor
    """The label of the next token, never across a document border; -100 where there is none."""

    num_label_tokens: int
    num_tokens: int
    """Tokens that are not padding."""

    row_ids: tuple[int, ...]

    real_tokens: Tensor | None = None
    """bool ``[B, S]``: what is not padding; None where nothing is. Padding is computed and routed like any token, but
    carries no loss and does not count in an expert's load."""


class Rows(Protocol):
    """What ``Batches`` reads from."""

    num_rows: int
    seq_len: int
    fingerprint: str

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """``(input_ids, position_ids, shift_labels)``, each int64 ``[seq_len]``, and the number of real tokens."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """Rows of documents over a token array, usually memory-mapped."""

    tokens: np.ndarray
    """int32 ``[all tokens]``."""

    mask: np.ndarray
    """uint8 ``[all tokens]``, 1 where the token is learned."""

    piece_start: np.ndarray
    """int64 ``[pieces]``: first token of each piece, row after row. A piece is a document, or a part of a long text."""

    piece_length: np.ndarray
    """int64 ``[pieces]``."""

    row_offsets: np.ndarray
    """int64 ``[rows + 1]``: where each row starts among the pieces."""

    seq_len: int
    pad_id: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """See ``Rows.row``."""
        input_ids = np.full(self.seq_len, self.pad_id, np.int64)
        position_ids = np.empty(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORE, np.int64)
        at = 0
        for piece in range(self.row_offsets[index], self.row_offsets[index + 1]):
            start, length = int(self.piece_start[piece]), int(self.piece_length[piece])
            ids = self.tokens[start : start + length]
            input_ids[at : at + length] = ids
            position_ids[at : at + length] = np.arange(length)
            learned = self.mask[start + 1 : start + length] != 0
            labels[at : at + length - 1] = np.where(learned, ids[1:], IGNORE)
            at += length
        position_ids[at:] = np.arange(self.seq_len - at)
        return input_ids, position_ids, labels, at


@dataclass(frozen=True, kw_only=True)
class RandomRows:
    """Uniform tokens in ``[0, vocab_size)``, one document a row, each row a function of (seed, index)."""

    vocab_size: int
    seq_len: int
    seed: int
    num_rows: int = NUM_RANDOM_ROWS

    @property
    def fingerprint(self) -> str:
        return f"random_tokens-{self.vocab_size}-{self.seq_len}-{self.seed}-{self.num_rows}"

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """See ``Rows.row``. Every token but the last has a label."""
        input_ids = (_random_bits(self.seed, index, self.seq_len) % np.uint64(self.vocab_size)).astype(np.int64)
        labels = np.append(input_ids[1:], IGNORE)
        return input_ids, np.arange(self.seq_len), labels, self.seq_len


def _random_bits(seed: int, stream: int, count: int) -> np.ndarray:
    """uint64 ``[count]``. Raw bits of a bit generator, which numpy keeps equal over versions and machines."""
    key = np.array([seed % (1 << 64), stream], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


class Batches:
    """Every batch of a run, from the step alone.

    Positions run on over epochs; position p is row ``order(seed, p // N)[p % N]`` of N rows. With G rows a step over
    all ranks, step s takes the positions ``[s*G, (s+1)*G)``, so its rows do not depend on how ranks and microbatches
    share them:

        position - s*G      0 1   2 3   4 5   6 7      (2 ranks, micro_batch_size 2, grad_accum_steps 2)
        rank                 0     1     0     1
        microbatch           0     0     1     1

    Args:
        rows: what to read.
        rank: this rank among ``num_ranks`` that see distinct batches.
        seed: with ``shuffle``, fixes the order of every epoch.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        rank: int,
        num_ranks: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.rows = rows
        self.rank = rank
        self.num_ranks = num_ranks
        self.micro_batch_size = micro_batch_size
        self.grad_accum_steps = grad_accum_steps
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    @property
    def rows_per_step(self) -> int:
        return self.num_ranks * self.micro_batch_size * self.grad_accum_steps

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and their packing; a run may only resume on equal data."""
        return self.rows.fingerprint

    def epoch_of(self, step: int) -> float:
        """Passes over the data that are done when ``step`` starts."""
        return step * self.rows_per_step / self.num_rows

    def step(self, step: int) -> list[Batch]:
        """This rank's ``grad_accum_steps`` microbatches of a step; steps count from 0."""
        first = step * self.rows_per_step
        return [
            self._batch(first + (micro * self.num_ranks + self.rank) * self.micro_batch_size)
            for micro in range(self.grad_accum_steps)
        ]

    def _batch(self, first: int) -> Batch:
        row_ids = tuple(self._row_at(position) for position in range(first, first + self.micro_batch_size))
        rows = [self.rows.row(row_id) for row_id in row_ids]
        input_ids, position_ids, labels = (torch.from_numpy(np.stack([row[i] for row in rows])) for i in range(3))
        tokens = torch.tensor([row[3] for row in rows])
        real = torch.arange(input_ids.shape[1]) < tokens[:, None]  # padding is at a row's end
        return Batch(
            input_ids=input_ids,
            position_ids=position_ids,
            shift_labels=labels,
            real_tokens=None if bool(real.all()) else real,
            num_label_tokens=int((labels != IGNORE).sum()),
            num_tokens=sum(row[3] for row in rows),
            row_ids=row_ids,
        )

    def _row_at(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        return int(self._order(epoch)[index]) if self.shuffle else index

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation: rows sorted by random bits. A step can touch two epochs, so the newest two stay."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = np.argsort(_random_bits(self.seed, epoch, self.num_rows), kind="stable")
        return self._orders[epoch]
