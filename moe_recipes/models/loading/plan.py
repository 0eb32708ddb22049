"""Where every tensor of a model lies in its source's files, and which bytes of them a rank reads, before any is read.

The names come from the plan of an export (``exporting/plan.py``), which is the reverse of a load: what a tensor becomes
on disk is what it is read from. Loader and rehearsal share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

from moe_recipes.config.errors import CorruptCheckpointError, RecipeError
from moe_recipes.models.exporting.convert import Converter
from moe_recipes.models.exporting.plan import PlannedTensor, plan_tensors, saved_tensors
from moe_recipes.models.loading.conversions import keep_used, known_conversions
from moe_recipes.models.loading.files import WeightFiles
from moe_recipes.models.loading.stored import Quantization, Stored, find_stored
from moe_recipes.models.mtp import mtp_of

_PROBES = ((8, 12), (24, 16))
"""Rows and columns of the numbered experts that show where a conversion puts a part."""

_IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Keys of old files for what is no weight any more."""


class SeveralAtOnceError(RecipeError):
    """The family's conversion makes several tensors of a model out of one, or the reverse."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of one expert of a model's tensor one disk tensor is: chunk ``index`` of ``count`` on a dimension."""

    dim: int
    index: int
    count: int
    transposed: bool

    def of(self, expert: Tensor) -> Tensor:
        """The view of an expert's ``[A, B]`` (or ``[A]``) that has the shape of the disk tensor."""
        size = expert.shape[self.dim] // self.count
        part = expert.narrow(self.dim, self.index * size, size)
        return part.t() if self.transposed else part


@dataclass(frozen=True, kw_only=True)
class Load:
    """One tensor of the model's state dict and what it is read from."""

    planned: PlannedTensor
    stored: dict[str, Stored | None]
    """By disk key of the plan; None where the source does not have it."""

    parts: tuple[Part, ...] = ()
    """For experts that are read one by one: where each of the plan's templates lies in an expert."""

    same_as: str | None = None
    """The tensor of the model that this repeats: it is compared with it, and is no memory of its own."""

    @property
    def is_mixed(self) -> bool:
        """True where the conversion mixes rows, so that all of them are read for any."""
        return self.planned.how != "rows" and not self.parts

    def of_rows(self, start: int, end: int) -> Iterator[tuple[Stored, int, int, int | None, int]]:
        """What is read for these rows of the tensor: (stored, first row, end row, expert, template).

        The rows are those of the stored tensor, the expert is counted in the whole model; all rows of all keys where
        the conversion mixes rows.
        """
        if self.parts:
            for expert in range(start, end):
                for number, key in enumerate(self.planned.keys_of_expert(expert)):
                    if stored := self.stored[key]:
                        yield stored, 0, _rows(self.planned.disk[key][1]), expert, number
            return
        for key, stored in self.stored.items():
            if stored is not None:
                yield stored, *((0, _rows(self.planned.disk[key][1])) if self.is_mixed else (start, end)), None, 0


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Equal on all ranks."""

    loads: list[Load]
    conversions: list[WeightTransform]
    num_files: int
    missing: list[str]
    """Keys that the source lacks. Those that the family does without are not among them."""

    left_out: list[str]
    """Keys that nothing is read from."""

    def check(self, model: PreTrainedModel, files: WeightFiles) -> None:
        """The source has all weights of the model, and no layer or expert that the model lacks.

        Raises:
            CorruptCheckpointError: names the first tensor.
        """
        mend = "fetch the model again, or the config.json that belongs to its weights"
        if self.missing:
            tensors = sum(any(stored is None for stored in load.stored.values()) for load in self.loads)
            whose = ""
            if len(self.missing) > sum(len(load.stored) for load in self.loads) / 2:
                whose = f"; these are not the weights of a {model.config.model_type}"
            raise CorruptCheckpointError(
                f"{files.folder}: no weights for {self.missing[0]} ({len(self.missing)} of its keys, {tensors} tensors"
                f" of the model are missing){whose}; {mend}"
            )
        read = {_numberless(key) for load in self.loads for stored in load.stored.values() if stored is not None
                for key in stored.keys}  # fmt: skip
        ignored = re.compile("|".join(f"({p})" for p in (*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))))
        more = [key for key in self.left_out if _numberless(key) in read and not ignored.search(key)]
        if more:
            raise CorruptCheckpointError(
                f"{files.folder}: {more[0]} ({len(more)} such tensors) is of a layer or expert that config.json does"
                f" not have; {mend}"
            )


def _numberless(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", key)


def plan_loads(model: PreTrainedModel, files: WeightFiles, quantization: Quantization | None) -> LoadPlan:
    """Plan the load of a model, on any device, from files of which only the index is read.

    The conversions that the files' keys need are left on the model, as ``from_pretrained`` does, for its export.

    Raises:
        SeveralAtOnceError: the family's conversion does not go tensor by tensor.
    """
    conversions = known_conversions(model)
    if files.weight_map:
        keep_used(model, _used(files, conversions))
    convert = Converter(model)
    state = saved_tensors(model)
    try:
        planned = plan_tensors(state, convert, model)
    except RecipeError as error:
        raise SeveralAtOnceError(str(error)) from None
    find = _Finder(model, files, quantization)
    tied = model.all_tied_weights_keys or {}
    loads = [find.load(tensor, convert) for tensor in planned if tensor.name not in tied]
    for target, source in tied.items():
        loads = [find.tied(load, target, convert) if load.planned.name == source else load for load in loads]
        loads += find.tied_copies(loads, target, source, convert)
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        key for load in loads for key, stored in load.stored.items()
        if stored is None and not any(pattern.search(load.planned.name) for pattern in optional)
    ]  # fmt: skip
    used = {key for load in loads for stored in load.stored.values() if stored is not None for key in stored.keys}
    return LoadPlan(
        loads=loads,
        conversions=conversions,
        num_files=len(files.names),
        missing=missing,
        left_out=sorted(files.weight_map.keys() - used),
    )


def _used(files: WeightFiles, conversions: list[WeightTransform]) -> list[WeightTransform]:
    """Those of the conversions that a key of the files needs."""
    renamings, converters = split_conversions(conversions)
    for key in files.weight_map:
        rename_source_key(key, renamings, converters)
    return [conversion for conversion in conversions if conversion.was_used()]


def split_conversions(conversions: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    return renamings, [one for one in conversions if isinstance(one, WeightConverter)]


class _Finder:
    """Finds what the tensors of one model are read from."""

    def __init__(self, model: PreTrainedModel, files: WeightFiles, quantization: Quantization | None) -> None:
        mtp = mtp_of(model)
        self.copies = mtp.copies if mtp is not None else {}
        self.prefix, self.files, self.quantization = model.base_model_prefix, files, quantization
        self.parts: dict[tuple[str, tuple[int, ...]], tuple[Part, ...]] = {}

    def stored(self, key: str, name: str) -> Stored | None:
        """By the key of the plan; or with the base model's name before it or without, as a base model is saved; or by
        the tensor's own name."""
        if not self.files.weight_map:
            return Stored(key=key, kind="plain", keys=(key,))
        for candidate in (key, key.removeprefix(f"{self.prefix}."), f"{self.prefix}.{key}", name):
            if found := find_stored(self.files, candidate, self.quantization):
                return found
        return None

    def load(self, tensor: PlannedTensor, convert: Converter) -> Load:
        pattern = _numberless(f"{tensor.name}."), tensor.shape
        if tensor.how == "experts" and pattern not in self.parts:
            self.parts[pattern] = expert_parts(tensor, convert)
        own = tensor.name if len(tensor.disk) == 1 else ""
        stored = {key: self.stored(key, own) for key in tensor.disk}
        parts = self.parts.get(pattern, ()) if tensor.how == "experts" else ()
        return Load(planned=tensor, stored=stored, parts=parts, same_as=self.copies.get(tensor.name))

    def _key(self, load: Load, target: str, convert: Converter) -> str | None:
        meta = torch.empty(load.planned.shape, dtype=next(iter(load.planned.disk.values()))[0], device="meta")
        keys = list(convert({target: meta}))
        return keys[0] if len(keys) == 1 else None

    def tied(self, load: Load, target: str, convert: Converter) -> Load:
        """As ``load``; read from its tied ``target`` where the source holds only that one."""
        key = self._key(load, target, convert)
        if key is None or len(load.stored) != 1 or None not in load.stored.values():
            return load
        return replace(load, stored=dict.fromkeys(load.stored, self.stored(key, target)))

    def tied_copies(self, loads: list[Load], target: str, source: str, convert: Converter) -> Iterator[Load]:
        """What the source holds under both names of a tied tensor is read twice, to see that it is the same."""
        for load in loads:
            key = self._key(load, target, convert) if load.planned.name == source else None
            stored = self.stored(key, target) if key is not None else None
            if key is not None and stored is not None and stored not in load.stored.values():
                spec = next(iter(load.planned.disk.values()))
                yield Load(
                    planned=replace(load.planned, name=target, disk={key: spec}), stored={key: stored}, same_as=source
                )


def expert_parts(tensor: PlannedTensor, convert: Converter) -> tuple[Part, ...]:
    """Where each disk tensor of an expert lies in the model's, found on numbered values of two small sizes and held
    against the true shapes; empty if it is no plain cut or transpose."""
    found: list[Part | None] = []
    for probe_shape in _PROBES:
        shape = (2, *probe_shape[: len(tensor.shape) - 1])
        probe = torch.arange(math.prod(shape), dtype=torch.int64).view(shape)
        try:
            converted = convert({tensor.name: probe})
        except (ValueError, RuntimeError, IndexError, AttributeError):
            return ()
        parts = [_part_of(probe[1], converted.get(f"{before}1{after}")) for before, after in tensor.templates]
        if found and parts != found:
            return ()
        found = list(parts)
    expert = torch.empty(tensor.shape[1:], device="meta")
    shapes = [tensor.disk[key][1] for key in tensor.keys_of_expert(0)]
    known = [part for part in found if part is not None]
    whole = len(known) == len(shapes) and all(
        expert.shape[part.dim] % part.count == 0 and tuple(part.of(expert).shape) == shape
        for part, shape in zip(known, shapes, strict=True)
    )
    covered = sum(math.prod(shape) for shape in shapes) == expert.numel()
    return tuple(known) if whole and covered else ()


def _part_of(expert: Tensor, part: Tensor | None) -> Part | None:
    if part is None:
        return None
    for count in range(1, 5):
        for dim in range(expert.ndim if count > 1 else 1):
            for index in range(count if expert.shape[dim] % count == 0 else 0):
                for transposed in (False, True)[: expert.ndim]:
                    candidate = Part(dim=dim, index=index, count=count, transposed=transposed)
                    if torch.equal(candidate.of(expert), part):
                        return candidate
    return None
