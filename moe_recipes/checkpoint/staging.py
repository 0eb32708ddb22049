"""Host memory that a checkpoint is copied into, so that it can be written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moe_recipes.checkpoint.entry import Entry


def staging_bytes(entries: Mapping[str, Entry]) -> int:
    """Bytes that ``Staging`` of these entries holds on this rank: what the rank writes."""
    return sum(entry.tensor.numel() * entry.tensor.element_size() for entry in entries.values() if _is_written(entry))


class Staging:
    """Copies of what this rank writes, in the same buffers for every save; pinned where tensors are on a GPU.

    Args:
        entries: as for ``save_checkpoint``; later copies must have the same names, shapes and dtypes.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.buffers = {
            name: torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, pin_memory=entry.tensor.is_cuda)
            for name, entry in entries.items()
            if _is_written(entry)
        }

    @torch.no_grad()
    def copy(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The entries with their tensors in the buffers, as they are now. Returns when all of it is copied.

        Raises:
            ValueError: an entry is new, or has another shape or dtype than the buffer.
        """
        copied, devices = {}, set()
        for name, entry in entries.items():
            if not _is_written(entry):
                # Described, not written: its shape is all that is wanted, and the weights change meanwhile.
                copied[name] = replace(entry, tensor=entry.tensor.detach().to("meta"))
                continue
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != entry.tensor.shape or buffer.dtype != entry.tensor.dtype:
                raise ValueError(f"no buffer was planned for {name!r} of shape {tuple(entry.tensor.shape)}")
            buffer.copy_(entry.tensor.detach(), non_blocking=True)
            devices.add(entry.tensor.device)
            copied[name] = replace(entry, tensor=buffer)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copied


def _is_written(entry: Entry) -> bool:
    return bool(entry.rows.primary and entry.rows.count)
