"""Who holds which rows of a parameter, for every rank of the mesh, from the mesh and the placements alone.

    one FSDP mesh             [rows 0 .. r) on rank 0, [r .. 2r) on rank 1, ...
    experts, ep x efsdp       ep cuts first, efsdp cuts each of its parts:  rank = efsdp * ep_size + ep
    dp_replicate in front     every row on that many ranks, one of them the primary

The arithmetic is written out here a second time, apart from torch's, so that one can be held against the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

RANKS_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Held:
    """The rows ``[start, end)`` of a parameter that one rank holds; ``primary`` on one replica only."""

    rank: int
    start: int
    end: int
    primary: bool

    @property
    def count(self) -> int:
        return self.end - self.start


def holders(tensor: Tensor, *, num_ranks: int) -> list[Held]:
    """The part of every rank of the tensor's mesh, ranks in order; a plain tensor lies whole on each of ``num_ranks``.

    Raises:
        ValueError: it is sharded on another dimension than 0, which no layout of this package does.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return [Held(rank=rank, start=0, end=rows, primary=rank == 0) for rank in range(num_ranks)]
    wrong = [p for p in tensor.placements if not p.is_replicate() and getattr(p, "dim", None) != 0]
    if wrong:
        raise ValueError(f"{wrong[0]} is not on dimension 0")
    mesh = tensor.device_mesh.mesh
    found = []
    for coordinate in itertools.product(*map(range, mesh.shape)):
        start, end = _span(rows, tuple(mesh.shape), coordinate, tensor.placements)
        replicas = [i for i, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate()]
        found.append(Held(rank=int(mesh[coordinate]), start=start, end=end, primary=not any(replicas)))
    return sorted(found, key=lambda held: held.rank)


def _span(rows: int, sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[object]) -> tuple[int, int]:
    sharded = [axis for axis, p in enumerate(placements) if not p.is_replicate()]  # type: ignore[attr-defined]
    # What torch calls a strided shard was cut after the axes to its right.
    late = [axis for axis in sharded if type(placements[axis]).__name__ == "_StridedShard"]
    start, end = 0, rows
    for axis in [*(axis for axis in sharded if axis not in late), *late]:
        size = -(-(end - start) // sizes[axis])
        start = min(end, start + size * coordinate[axis])
        end = min(end, start + size)
    return start, end


def ownership_problems(rows: int, held: Iterable[Held], *, replicas: int) -> list[str]:
    """What is wrong with how a parameter of so many rows is spread: empty if each row has ``replicas`` holders.

    Args:
        replicas: ``dp_replicate_size``, the number of ranks that are meant to hold a row.
    """
    held = [one for one in held if one.count]
    problems = []
    edges = sorted({0, rows, *(one.start for one in held), *(one.end for one in held)})
    for start, end in itertools.pairwise(edges):
        here = [one for one in held if one.start <= start and end <= one.end]
        primaries = [one.rank for one in here if one.primary]
        where = f"rows {start}:{end} of {rows}"
        if not here:
            problems.append(f"unowned: no rank holds {where}")
        elif len(here) > replicas:
            whole = all(one.count == rows for one in here) and len(here) > 1
            kind = "replicated by mistake" if whole else "owned twice"
            problems.append(f"{kind}: {where} on {len(here)} ranks, not {replicas}: {_some(one.rank for one in here)}")
        elif len(here) < replicas:
            problems.append(f"unowned: {where} on {len(here)} ranks, not {replicas}")
        elif len(primaries) != 1:
            kind = "owned twice" if primaries else "unowned"
            problems.append(f"{kind}: {where} has {len(primaries)} primary holders {_some(primaries)}")
    return problems


def _some(ranks: Iterable[int]) -> str:
    listed = [str(rank) for rank in sorted(ranks)]
    return ", ".join(listed[:RANKS_SHOWN]) + (", ..." if len(listed) > RANKS_SHOWN else "")


def describe_placement(tensor: Tensor) -> str:
    """``fsdp 128`` or ``dp_replicate 2 x efsdp 2 x ep 64``: the mesh axes that cut or repeat a tensor's rows."""
    if not isinstance(tensor, DTensor):
        return "whole on every rank"
    names = tensor.device_mesh.mesh_dim_names or [f"axis {i}" for i in range(tensor.device_mesh.ndim)]
    parts = []
    for name, size, placement in zip(names, tensor.device_mesh.shape, tensor.placements, strict=True):
        copies = placement.is_replicate() and size > 1
        parts.append(f"{name} {size}" + (" (copies)" if copies else ""))
    return " x ".join(parts)
