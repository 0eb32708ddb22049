"""Which slices of the source's safetensors files a rank would read: the rows and the experts that it holds, no more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_recipes.config.errors import MissingInputError, RecipeError
from moe_recipes.models.exporting.plan import saved_tensors
from moe_recipes.models.loading.files import WeightFiles, open_weights
from moe_recipes.models.loading.plan import Load, plan_loads
from moe_recipes.models.loading.stored import Quantization, Stored, stored_rows, stored_shapes
from moe_recipes.prove.ownership import Held, holders
from moe_recipes.runtime.safetensors_file import Place

_CODES = {"fp8": (torch.float8_e4m3fn, torch.float32), "mxfp4": (torch.uint8, torch.uint8)}
"""Dtypes of codes and scales whose file is not here."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One run of bytes of one tensor on disk."""

    key: str
    rows: tuple[int, int]
    """First row, and one past the last."""

    shape: tuple[int, ...]
    """Of the whole tensor."""

    num_bytes: int
    file: str | None
    offset: int | None
    """Where it starts in the file; None where the file is not here."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("key", "rows", "shape", "num_bytes", "file", "offset")}


def known_weights(folder: Path) -> WeightFiles:
    """What is known of a source's weight files: nothing, their index, or also the headers of those that are here.

    Raises:
        CorruptCheckpointError: the index or a file that is here is damaged.
    """
    try:
        return open_weights(folder)
    except (MissingInputError, RecipeError):
        return WeightFiles(folder, {})


def describe_known(files: WeightFiles) -> str:
    """One line on what is known."""
    if not files.weight_map:
        return "no index here: from the key layout of the family"
    here = sum(files.is_here(name) for name in files.weight_map.values())
    return f"index of {len(files.weight_map):,} keys, {here:,} of them in files that are here"


class Reads:
    """What each rank reads of a model's source. Made once; the planned tensors are the same on every rank."""

    def __init__(
        self, model: PreTrainedModel, files: WeightFiles, *, num_ranks: int, quantization: Quantization | None = None
    ) -> None:
        state = saved_tensors(model)
        self.plan = plan_loads(model, files, quantization)
        self.files = files
        self.block = (quantization or Quantization(method="fp8")).block
        self.held: dict[str, dict[int, Held]] = {}
        for load in self.plan.loads:
            tensor = state[load.same_as or load.planned.name]
            spread = [] if load.is_mixed else holders(tensor, num_ranks=num_ranks)
            self.held[load.planned.name] = {held.rank: held for held in spread}

    def problems(self) -> list[str]:
        """Keys that the source lacks, or has in another shape; empty where no index is known."""
        found = [f"{key}: no file of the source holds it" for key in self.plan.missing]
        for load in self.plan.loads if self.files.weight_map else ():
            for wanted, stored in load.stored.items():
                for key, shape, place in self._parts(load, wanted, stored) if stored is not None else ():
                    if place is not None and place.shape != shape:
                        found.append(f"{key}: {list(place.shape)} in the source, {list(shape)} in the model")
        return found

    def left_out(self) -> list[str]:
        """Keys of the source that no rank reads."""
        return self.plan.left_out

    def of_rank(self, rank: int) -> Iterator[Slice]:
        """The slices of one rank, in the order of the model's tensors."""
        for load in self.plan.loads:
            held = self.held[load.planned.name].get(rank)
            if not load.is_mixed and (held is None or not held.count):
                continue
            rows = (held.start, held.end) if held is not None else (0, 0)
            wanted = {stored: key for key, stored in load.stored.items()}
            for stored, start, end, _, _ in load.of_rows(*rows):
                shape = load.planned.disk[wanted[stored]][1]
                spans = stored_rows(stored, shape, start, end, self.block[0])
                parts = self._parts(load, wanted[stored], stored)
                for number, (span, (key, known, place)) in enumerate(zip(spans, parts, strict=True)):
                    dtype = load.planned.disk[wanted[stored]][0]
                    if stored.kind != "plain":
                        dtype = _CODES[stored.kind][number]
                    yield self._slice(key, span, known, dtype, place)

    def _parts(self, load: Load, wanted: str, stored: Stored) -> list[tuple[str, tuple[int, ...], Place | None]]:
        """Each stored key with the shape that it should have, and its place if its file is here."""
        shapes = stored_shapes(stored, load.planned.disk[wanted][1], self.block)
        files = [self.files.weight_map.get(key) for key in stored.keys]
        places = [
            self.files.layout(name).places.get(key) if name is not None and self.files.is_here(name) else None
            for key, name in zip(stored.keys, files, strict=True)
        ]
        return list(zip(stored.keys, shapes, places, strict=True))

    def _slice(
        self, key: str, span: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype, place: Place | None
    ) -> Slice:
        if place is not None:
            dtype, shape = place.dtype, place.shape
        start, end = span
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return Slice(
            key=key,
            rows=(start, end),
            shape=shape,
            num_bytes=(end - start) * row_bytes,
            file=self.files.weight_map.get(key),
            offset=None if place is None else place.offset + start * row_bytes,
        )
