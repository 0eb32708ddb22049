"""Which slices of the source's safetensors files a rank would read: the rows and the experts that it holds, no more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_recipes.models.export_convert import Converter
from moe_recipes.models.export_plan import INDEX_NAME, PlannedTensor, plan_tensors, saved_tensors
from moe_recipes.prove.ownership import Held, holders
from moe_recipes.runtime.safetensors_file import Place, read_layout


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


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """What is known of a source's weight files: nothing, their index, or also their headers."""

    weight_map: Mapping[str, str]
    """Key -> file; empty where there is no index."""

    places: Mapping[str, Place]
    """Keys of the files that are here."""

    @property
    def known(self) -> str:
        if not self.weight_map:
            return "no index here: from the key layout of the family"
        return f"index of {len(self.weight_map):,} keys, {len(self.places):,} of them in files that are here"


def read_index(folder: Path) -> SourceIndex:
    """The index of a model folder, and the headers of those of its files that are there."""
    index, single = folder / INDEX_NAME, folder / "model.safetensors"
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = json.loads(index.read_bytes())["weight_map"]
    elif single.is_file():
        weight_map = dict.fromkeys(read_layout(single).places, single.name)
    places: dict[str, Place] = {}
    for name in sorted({*weight_map.values()}):
        if Path(name).name == name and (folder / name).is_file():
            places.update(read_layout(folder / name).places)
    return SourceIndex(weight_map=weight_map, places=places)


class Reads:
    """What each rank reads of a model's source. Made once; the planned tensors are the same on every rank."""

    def __init__(self, model: PreTrainedModel, index: SourceIndex, *, num_ranks: int) -> None:
        state = saved_tensors(model)
        self.planned = plan_tensors(state, Converter(model), model)
        self.held: dict[str, dict[int, Held]] = {}
        for planned in self.planned:
            spread = holders(state[planned.name], num_ranks=num_ranks) if planned.how != "gather" else []
            self.held[planned.name] = {held.rank: held for held in spread}
        self.index = index

    def problems(self) -> list[str]:
        """Keys that the source lacks, or has in another shape; empty where no index is known."""
        found = []
        for key, (_, shape) in self._disk() if self.index.weight_map else ():
            place = self.index.places.get(key)
            if key not in self.index.weight_map:
                found.append(f"{key}: no file of the source holds it")
            elif place is not None and place.shape != shape:
                found.append(f"{key}: {list(place.shape)} in the source, {list(shape)} in the model")
        return found

    def left_out(self) -> list[str]:
        """Keys of the source that no rank reads."""
        return sorted(self.index.weight_map.keys() - {key for key, _ in self._disk()})

    def _disk(self) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
        for planned in self.planned:
            yield from planned.disk.items()

    def of_rank(self, rank: int) -> Iterator[Slice]:
        """The slices of one rank, in the order of the model's tensors."""
        for planned in self.planned:
            if planned.how == "gather":  # a conversion that mixes rows needs the whole tensor
                yield from (self._slice(planned, key, None) for key in planned.disk)
                continue
            held = self.held[planned.name].get(rank)
            if held is None or not held.count:
                continue
            if planned.how == "rows":
                yield from (self._slice(planned, key, held) for key in planned.disk)
                continue
            for expert in range(held.start, held.end):
                yield from (self._slice(planned, key, None) for key in planned.keys_of_expert(expert))

    def _slice(self, planned: PlannedTensor, key: str, held: Held | None) -> Slice:
        dtype, shape = planned.disk[key]
        place = self.index.places.get(key)
        if place is not None:
            dtype, shape = place.dtype, place.shape
        rows = shape[0] if shape else 1
        start, end = (0, rows) if held is None else (held.start, held.end)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return Slice(
            key=key,
            rows=(start, end),
            shape=shape,
            num_bytes=(end - start) * row_bytes,
            file=self.index.weight_map.get(key),
            offset=None if place is None else place.offset + start * row_bytes,
        )
