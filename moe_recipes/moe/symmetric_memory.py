"""Memory that every rank of a group can write: CUDA symmetric memory, or files in shared memory for ranks on the CPU.

The buffers are as large as the worst routing needs, and one set serves every layer, forward and backward, because of
two meetings a pass:

    push             a rank's rows into the others' ``rows``
    meet             all that was pushed has arrived
    compute          from own buffers, into private memory
    combine          sums into the others' ``back``
    meet             all that was combined has arrived; nobody reads ``rows`` any more
    collect          from own ``back``

A rank that pushes the next pass has met all others after they last read ``rows``, and one that combines has met them
after they last read ``back``: nothing is overwritten that somebody still needs, and no buffer is there twice.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_recipes.config.errors import EnvironmentMismatchError, first_line
from moe_recipes.kernels.peer_rows import Region

_ALIGNMENT = 256
_SHARED_MEMORY = "/dev/shm"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _cuda_memory(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[object, list[Tensor]]:
    """The handle, which keeps the memory, and every rank's bytes of it."""
    import torch.distributed._symmetric_memory as symmetric_memory

    try:
        memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(memory, group)
    except RuntimeError as error:
        raise EnvironmentMismatchError(
            f"parallel.ep_implementation: these GPUs cannot write each other's memory ({first_line(error)}); set"
            f" moe_recipes_all_to_all, or an ep_size whose ranks share a node with NVLink"
        ) from error
    ranks = range(dist.get_world_size(group))
    return handle, [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in ranks]


def _host_memory(num_bytes: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's bytes as a file that all ranks of this host map; the files have no name any more afterwards."""
    handle, path = tempfile.mkstemp(dir=_SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else None)
    os.ftruncate(handle, num_bytes)
    os.close(handle)
    paths: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(paths, path, group=group)
    views = [torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8) for name in paths]
    dist.barrier(group)
    os.unlink(path)
    return views


class PeerMemory:
    """``num_bytes`` on every rank of a group, mapped into every rank. Making one is a collective of the group.

    Raises:
        EnvironmentMismatchError: the GPUs cannot reach each other's memory.
    """

    def __init__(self, num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.handle: object | None = None
        if device.type == "cuda":
            self.handle, self.bytes_of_ranks = _cuda_memory(num_bytes, group, device)
        else:
            self.bytes_of_ranks = _host_memory(num_bytes, group)
        self.pointers_P = torch.tensor([part.data_ptr() for part in self.bytes_of_ranks], device=device)

    def meet(self) -> None:
        """Wait, on the device, until every rank's earlier writes have arrived everywhere."""
        if self.handle is None:
            dist.barrier(self.group)
        else:
            self.handle.barrier(channel=0)  # type: ignore[attr-defined]

    def region(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Region:
        """A tensor at the same place of every rank's memory; ``offset`` in bytes."""
        size = math.prod(shape) * dtype.itemsize
        views = [part[offset : offset + size].view(dtype).view(*shape) for part in self.bytes_of_ranks]
        return Region(views=views, pointers_P=self.pointers_P + offset)


class Buffers:
    """The buffers of one shape of layer, for up to ``room`` tokens a rank; G = P * room places.

    Rows, weights and the gradients of rows have one more place, for routed rows that are not there.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, *, room: int, width: int, top_k: int,
        dtype: torch.dtype, weight_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.room, self.rank, self.num_ranks = room, dist.get_rank(group), dist.get_world_size(group)
        places = room * self.num_ranks
        layout = {
            "rows": (places + 1, width, dtype),
            "grads": (places + 1, width, dtype),
            "back": (places, width, dtype),
            "index": (places, top_k, torch.int32),
            "weight": (places + 1, top_k, weight_dtype),
            "grad_weight": (places, top_k, weight_dtype),
        }
        offsets, end = {}, 0
        for name, (rows, columns, kind) in layout.items():
            offsets[name] = end
            end += _aligned(rows * columns * kind.itemsize)
        self.memory = PeerMemory(end, group, device)
        shapes = {name: ((places, columns), kind) for name, (_, columns, kind) in layout.items()}
        self.to = {name: self.memory.region(offsets[name], *shapes[name]) for name in layout}
        """Every rank's buffers, to write to."""

        own = {name: ((rows, columns), kind) for name, (rows, columns, kind) in layout.items()}
        self.own = {name: self.memory.region(offsets[name], *own[name]).views[self.rank] for name in layout}
        """This rank's own, to read from."""
