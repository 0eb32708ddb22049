"""Whole tensors from shards, and how far two sets of tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """The global value of a parameter or gradient, a copy. A collective for sharded ones."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name, whole, of those that have one."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def relative_error(value: Tensor, reference: Tensor, *, floor: float = 0.0) -> float:
    """Norm of the difference over norm of the reference; infinite where only the reference is zero.

    Args:
        floor: added to the norm of the reference: the size below which a tensor is rounding noise.
    """
    if value.shape != reference.shape:
        return math.inf
    error = float((value.detach().double() - reference.detach().double()).norm())
    norm = float(reference.detach().double().norm()) + floor
    if not math.isfinite(error):
        return math.inf
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def distances(
    values: Mapping[str, Tensor], references: Mapping[str, Tensor], *, floor: float = 0.0
) -> list[tuple[float, str]]:
    """Relative error of every tensor, and of each expert of the expert weights alone, the largest first.

    A name that only one side has is an infinite error.
    """
    errors = [(math.inf, name) for name in values.keys() ^ references.keys()]
    for name in values.keys() & references.keys():
        value, reference = values[name], references[name]
        errors.append((relative_error(value, reference, floor=floor), name))
        if ".experts." in name and value.shape == reference.shape and value.ndim > 1:
            errors += [
                (relative_error(value[e], reference[e], floor=floor), f"{name}[{e}]") for e in range(len(reference))
            ]
    return sorted(errors, reverse=True)


def worst(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest of ``distances``."""
    return distances(values, references)[0]
