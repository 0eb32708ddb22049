"""Read an exported folder back and compare it, rank by rank, with the model that it was written from."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_recipes.models.exporting.checksums import ExpertChecksums, Parts, equal_experts, equal_layers, merge_parts
from moe_recipes.models.exporting.convert import (
    Converter,
    converted_experts,
    gather_objects,
    gathered,
    written_pieces,
)
from moe_recipes.models.exporting.plan import (
    INDEX_NAME,
    PlannedTensor,
    Spec,
    plan_tensors,
    saved_tensors,
    spec_bytes,
    with_dtypes,
)
from moe_recipes.runtime.safetensors_file import FileLayout, read_layout, read_rows
from moe_recipes.runtime.sharding import local_rows, local_tensor


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What reading a folder back found. The same on every rank."""

    problems: list[str]
    equal: list[str]
    """Experts and layers that are equal, though every byte is right."""

    checksums: dict[str, int]
    """CRC-32 of the bytes of each tensor on disk; complete where there are no problems."""

    num_experts: int
    """Routed experts of all layers, every one compared with every other."""


def verify_export(
    out_dir: Path,
    model: PreTrainedModel,
    *,
    rank: int,
    num_ranks: int,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[str]:
    """Problems of an exported folder, the same list on every rank; empty means good. Every rank calls it.

    Index, files, keys, shapes and dtypes must be those of the model. Every rank reads the rows and experts that it
    holds and compares all bytes. No two experts may be equal, in one layer or in two, and no two layers.

    Args:
        dtypes: by disk key, where others than the model's were to be written.
    Raises:
        RecipeError: the model cannot be exported at all.
    """
    state = saved_tensors(model)
    convert = Converter(model)
    planned = with_dtypes(plan_tensors(state, convert, model), dtypes or {})
    found = check_folder(out_dir, planned, state, convert, rank=rank, num_ranks=num_ranks)
    return found.problems + found.equal


def check_folder(
    out_dir: Path,
    planned: list[PlannedTensor],
    state: Mapping[str, torch.Tensor],
    convert: Converter,
    *,
    rank: int,
    num_ranks: int,
) -> Verified:
    """``verify_export`` for a plan that is already made."""
    layouts, file_of, problems = _check_headers(out_dir, planned)
    experts: ExpertChecksums = defaultdict(lambda: defaultdict(list))
    reader = _Reader(out_dir, layouts, file_of, problems)
    try:
        for tensor in planned:
            _check_tensor(tensor, state[tensor.name], convert, reader, experts, rank)
    finally:
        reader.close()
    mine = problems, reader.parts, {name: dict(sums) for name, sums in experts.items()}
    everywhere = gather_objects(mine, num_ranks)
    problems = list(dict.fromkeys(problem for found, _, _ in everywhere for problem in found))  # all read the headers
    checksums, incomplete = merge_parts([parts for _, parts, _ in everywhere], planned)
    num_experts, equal = equal_experts([sums for _, _, sums in everywhere])
    if not problems:  # a tensor that could not be read is named already
        problems = incomplete
        equal += equal_layers(checksums, planned)
    return Verified(problems=problems, equal=equal, checksums=checksums, num_experts=num_experts)


def _check_headers(
    out_dir: Path, planned: list[PlannedTensor]
) -> tuple[dict[str, FileLayout], dict[str, str], list[str]]:
    """Layout of each file that can be read, the file of each key that is as planned, and the problems."""
    want = {key: spec for tensor in planned for key, spec in tensor.disk.items()}
    try:
        index = json.loads((out_dir / INDEX_NAME).read_bytes())
        weight_map, total_bytes = dict(index["weight_map"]), index["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, {}, [f"{INDEX_NAME}: cannot be read ({type(error).__name__}: {error})"]
    problems = [f"{INDEX_NAME}: {key} is missing" for key in want.keys() - weight_map.keys()]
    problems += [f"{INDEX_NAME}: {key} is not in the model" for key in weight_map.keys() - want.keys()]
    want_bytes = sum(spec_bytes(spec) for spec in want.values())
    if total_bytes != want_bytes:
        problems.append(f"{INDEX_NAME}: total_size is {total_bytes}, the model has {want_bytes}")
    layouts: dict[str, FileLayout] = {}
    on_disk = {path.name for path in out_dir.glob("*.safetensors")}
    for name in sorted(on_disk | set(weight_map.values())):
        try:
            layouts[name] = read_layout(out_dir / os.path.basename(name))
        except (OSError, ValueError) as error:
            problems.append(f"{name}: cannot be read ({error})")
            continue
        problems += [f"{name}: {key} is not this file's by the index" for key in layouts[name].places
                     if weight_map.get(key) != name]  # fmt: skip
    file_of = {}
    for key in want.keys() & weight_map.keys():
        name = weight_map[key]
        place = layouts[name].places.get(key) if name in layouts else None
        if place is None:
            problems += [f"{name}: {key} is missing"] * (name in layouts)
        elif (place.dtype, place.shape) != want[key]:
            dtype, shape = want[key]
            problems.append(f"{name}: {key} is {place.dtype} {place.shape}, the model has {dtype} {shape}")
        else:
            file_of[key] = name
    return layouts, file_of, sorted(problems)


class _Reader:
    """Compares tensors with the bytes on disk; a difference is added to ``problems``."""

    def __init__(
        self, out_dir: Path, layouts: dict[str, FileLayout], file_of: dict[str, str], problems: list[str]
    ) -> None:
        self.out_dir, self.layouts, self.file_of, self.problems = out_dir, layouts, file_of, problems
        self.opened: dict[str, int] = {}
        self.parts: Parts = defaultdict(list)
        """Of the rows that this rank answers for."""

    def compare(self, key: str, first_row: int, tensor: torch.Tensor, spec: Spec, *, primary: bool) -> tuple[int, ...]:
        """CRC-32 of each piece read; keys that the header check refused are passed over."""
        name = self.file_of.get(key)
        if name is None:
            return ()
        try:
            sums, same = self._read(name, key, first_row, written_pieces(key, tensor, spec[0]), primary=primary)
        except (OSError, ValueError) as error:  # kept, as the other ranks go on to the next collective
            self.problems.append(f"{name}: {key}: cannot be read ({error})")
            return ()
        if not same:
            rows = f"rows {first_row}..{first_row + len(tensor) - 1}" if tensor.ndim else "the value"
            self.problems.append(f"{name}: {key}: {rows} differ from the model")
        return tuple(sums)

    def _read(
        self, name: str, key: str, first_row: int, wanted: Iterable[tuple[int, torch.Tensor]], *, primary: bool
    ) -> tuple[list[int], bool]:
        if name not in self.opened:
            self.opened[name] = os.open(self.out_dir / name, os.O_RDONLY)
        sums, same = [], True
        for start, piece in wanted:
            host = piece.cpu().contiguous()
            found = torch.empty_like(host)
            sums.append(read_rows(self.opened[name], self.layouts[name], key, first_row + start, found))
            same = same and torch.equal(_raw(found), _raw(host))
            if primary:
                self.parts[key].append((first_row + start, found.nbytes, sums[-1]))
        return sums, same

    def close(self) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.view(-1).view(torch.uint8)


def _check_tensor(
    planned: PlannedTensor,
    tensor: torch.Tensor,
    convert: Converter,
    reader: _Reader,
    checksums: ExpertChecksums,
    rank: int,
) -> None:
    if planned.how == "gather":
        for key, part in gathered(planned.name, tensor, convert, rank=rank).items():
            reader.compare(key, 0, part, planned.disk[key], primary=True)
        return
    rows = local_rows(tensor, rank=rank)
    local = local_tensor(tensor).detach()
    if not rows.count:
        return
    if planned.how == "rows":
        key, spec = next(iter(planned.disk.items()))
        module, _, attribute = planned.name.rpartition(".")
        if not module.endswith(".experts") or local.ndim < 2:
            reader.compare(key, rows.start, local, spec, primary=rows.primary)
            return
        for index in range(rows.count):  # fused experts: one row an expert
            row = local[index : index + 1]
            sums = reader.compare(key, rows.start + index, row, spec, primary=rows.primary)
            if rows.primary:
                checksums[module][rows.start + index] += [(attribute, value) for value in sums]
        return
    experts = converted_experts(planned.name, local, rows.start, convert, planned.templates)
    for number, (key, part) in enumerate(experts):
        sums = reader.compare(key, 0, part, planned.disk[key], primary=rows.primary)
        before, after = planned.templates[number % len(planned.templates)]
        if rows.primary:
            checksums[before][rows.start + number // len(planned.templates)] += [(after, value) for value in sums]
