"""Transformers' reverse conversion (model tensors to disk tensors), applied to parts of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from moe_recipes.config.errors import NotFiniteError
from moe_recipes.runtime.safetensors_file import CHUNK_BYTES

Templates = tuple[tuple[str, str], ...]
"""What stands before and after the expert's number in each disk key of one expert."""


class Converter:
    """Transformers' reverse conversion of one model, callable on any part of its state dict.

    ``revert_weight_conversion`` looks the mapping up in all modules at each call when the model was not loaded from
    a folder; here it is looked up once, which makes a call for one tensor cost about a millisecond.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = get_model_conversion_mapping(model, add_legacy=False)
            conversions = [item for item in conversions if not isinstance(item, PrefixChange)]
        self._model: Any = model
        self._weight_conversions = conversions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Disk key -> tensor; a tensor that is only renamed is handed back as the same object."""
        return revert_weight_conversion(cast(Any, self), dict(tensors)) if self._weight_conversions else dict(tensors)


def converted_experts(
    name: str, local: torch.Tensor, first_expert: int, convert: Converter, templates: Templates
) -> Iterator[tuple[str, torch.Tensor]]:
    """The disk tensors of a run of experts under their global numbers, on the host.

    The copy to the host comes first: the conversion copies, and at the end of a run the device has no room for it.

    Args:
        local: ``[e, ...]``, the experts ``first_expert ...`` of the tensor ``name``.
    """
    converted = convert({name: local.cpu()})
    for index in range(len(local)):
        for before, after in templates:
            yield f"{before}{first_expert + index}{after}", converted.pop(f"{before}{index}{after}")


def written_pieces(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """Runs of rows of at most ``CHUNK_BYTES``, or of one row, each with its first row, in the dtype on disk.

    Another dtype costs a copy of one run at a time, on the tensor's device.

    Raises:
        NotFiniteError: a number is too large for the dtype.
    """
    if tensor.ndim == 0:
        yield 0, _written_as(key, tensor, dtype)
        return
    row_bytes = max(1, tensor.element_size() * tensor.shape[1:].numel())
    size = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(tensor), size):
        yield start, _written_as(key, tensor[start : start + size], dtype)


def _written_as(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    if dtype == torch.float16 and bool((narrow.isinf() & ~tensor.isinf()).any()):
        raise NotFiniteError(f"{key}: a weight is beyond 65504, the largest of float16, in which the source has it")
    return narrow


def gathered(name: str, tensor: torch.Tensor, convert: Converter, *, rank: int) -> dict[str, torch.Tensor]:
    """The disk tensors of one tensor whose conversion mixes rows: on rank 0, empty elsewhere. A collective."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return convert({name: full.detach().cpu()}) if rank == 0 else {}


def gather_objects(value: Any, num_ranks: int) -> list[Any]:
    """Each rank's small picklable ``value``, in rank order, on every rank."""
    if num_ranks == 1:
        return [value]
    values: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(values, value)
    return values
