"""One tensor as a checkpoint sees it: this rank's part, and which rows of the whole it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_recipes.runtime.sharding import Rows


@dataclass(frozen=True, kw_only=True)
class Entry:
    tensor: torch.Tensor
    """This rank's local part, CPU or CUDA, contiguous or not. Loading fills it in place."""

    rows: Rows
    """Which rows of the global tensor these are."""

    opaque: bool = False
    """The local tensor does not have the shape of its rows (quantised optimizer state). It loads only where a rank
    holds exactly the rows that one rank held when it was saved."""

    def check(self, name: str) -> None:
        """Raises ValueError where tensor and rows contradict each other."""
        start, end = self.rows.start, self.rows.start + self.rows.count
        if self.rows.count and not 0 <= start < end <= (self.rows.shape or (1,))[0]:
            raise ValueError(f"{name!r}: rows {start}..{end} are outside of {self.rows.shape}")
        if not self.opaque and tuple(self.tensor.shape) != self.rows.local_shape:
            raise ValueError(f"{name!r}: local shape {tuple(self.tensor.shape)}, rows {self.rows.local_shape}")
        if self.opaque and self.rows.count == 0 and self.tensor.numel():
            raise ValueError(f"{name!r}: a rank without rows holds {self.tensor.numel()} values")
