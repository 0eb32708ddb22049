"""Where a rank's part of a parameter lies in the whole parameter. Shared by init, checkpoint, export and clipping.

    dense weight [rows, columns] over fsdp = 4       expert weight [E, F, D] over ep = 2 x efsdp = 2

    rank    0      1      2      3                   rank    0      1      2      3
    rows   [0 r)  [r 2r) [2r 3r) [3r 4r)             ep      0      1      0      1      (E/2 experts each)
                                                     efsdp   0      0      1      1      (half of those each)

Every layout that this package makes shards dimension 0 only, so a rank's part is one run of whole rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The run of rows (dimension 0) of a global tensor that this rank holds; ``count`` 0 means none."""

    start: int
    count: int
    shape: tuple[int, ...]
    """Global shape."""

    primary: bool
    """True on exactly one of the ranks that hold these rows (the first replica)."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (self.count, *self.shape[1:]) if self.shape else ()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing storage: the tensor itself unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: torch.Tensor, *, rank: int) -> Rows:
    """Which rows of the global tensor this rank holds.

    Args:
        tensor: a DTensor sharded on dimension 0 only, or a plain tensor that every rank holds whole.
        rank: this rank; a plain tensor is primary on rank 0.
    Raises:
        ValueError: the tensor is sharded on another dimension.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Rows(start=0, count=shape[0] if shape else 1, shape=shape, primary=rank == 0)
    coordinate = tensor.device_mesh.get_coordinate()
    primary = True
    for index, placement in zip(coordinate, tensor.placements, strict=True):
        if placement.is_replicate():
            primary = primary and index == 0
        elif getattr(placement, "dim", None) != 0:
            raise ValueError(f"placement {placement} of a tensor {shape} is not on dimension 0")
    local_shape, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return Rows(start=offset[0], count=local_shape[0], shape=shape, primary=primary)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps gathered after a forward pass without a backward pass: parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_precision(model: nn.Module, patterns: Collection[str]) -> None:
    """Take parameters whose names hold one of ``patterns`` out of FSDP2's mixed precision; before the first forward.

    Mixed precision rounds a float32 parameter to bfloat16 whenever it gathers it. FSDP2 has no setting for single
    modules after the fact, so this sets the policy of each gathered group that holds such parameters only; a group
    that mixes them with others is one that FSDP2 refuses.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        # Newer releases of torch hold a list of groups, older ones a single group.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in filter(None, groups):
            places = [held._module_info for held in group.fsdp_params]
            held_names = [names.get(id(getattr(place.module, place.param_name)), "") for place in places]
            if held_names and all(any(pattern in name for pattern in patterns) for name in held_names):
                group.mp_policy = state._mp_policy = MixedPrecisionPolicy()
