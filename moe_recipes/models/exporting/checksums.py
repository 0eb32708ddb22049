"""Checksums of exported tensors, put together from what each rank wrote or read, and what they say about equality."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from moe_recipes.models.exporting.plan import PlannedTensor, spec_bytes
from moe_recipes.runtime.crc32 import combine

Parts = dict[str, list[tuple[int, int, int]]]
"""Disk key -> parts of its rows: (first row, bytes, CRC-32)."""

ExpertChecksums = dict[str, dict[int, list[tuple[str, int]]]]
"""Experts module -> expert -> (its tensor, CRC-32)."""


def merge_parts(everywhere: list[Parts], tensors: list[PlannedTensor]) -> tuple[dict[str, int], list[str]]:
    """CRC-32 of each whole tensor, and the tensors that the parts of all ranks do not make up."""
    merged: Parts = defaultdict(list)
    for parts in everywhere:
        for key, found in parts.items():
            merged[key] += found
    checksums, problems = {}, []
    for key, spec in ((key, spec) for tensor in tensors for key, spec in tensor.disk.items()):
        parts_of_key = sorted(merged.get(key, []))
        if sum(num_bytes for _, num_bytes, _ in parts_of_key) != spec_bytes(spec):
            problems.append(f"{key}: not all of its rows, or some twice")
        checksums[key] = combine((num_bytes, crc) for _, num_bytes, crc in parts_of_key)
    return checksums, problems


def equal_experts(everywhere: list[ExpertChecksums]) -> tuple[int, list[str]]:
    """The number of experts, and pairs that are equal, in one layer or in two."""
    merged: ExpertChecksums = defaultdict(lambda: defaultdict(list))
    for sums in everywhere:
        for module, experts in sums.items():
            for expert, values in experts.items():
                merged[module][expert] += values
    problems, count = [], 0
    first: dict[tuple[tuple[str, int], ...], tuple[str, int]] = {}
    for module, experts in merged.items():
        name = module.rstrip(".")
        for expert in filter(experts.get, sorted(experts)):  # one that could not be read is named elsewhere
            count += 1
            where, same = first.setdefault(tuple(sorted(experts[expert])), (name, expert))
            if where != name:
                problems.append(f"expert {same} of {where} and expert {expert} of {name} are equal")
            elif same != expert:
                problems.append(f"{name}: experts {same} and {expert} are equal")
    return count, problems


def equal_layers(checksums: Mapping[str, int], tensors: list[PlannedTensor]) -> list[str]:
    """Pairs of layers whose matrices outside of the experts are all equal."""
    layers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for key, (_, shape) in ((key, spec) for tensor in tensors for key, spec in tensor.disk.items()):
        place = re.match(r"(.*?\blayers\.\d+)\.(.*)", key)
        if place and len(shape) >= 2 and ".experts." not in key:
            layers[place[1]].append((place[2], checksums[key]))
    first: dict[tuple[tuple[str, int], ...], str] = {}
    pairs = ((first.setdefault(tuple(sorted(sums)), name), name) for name, sums in layers.items())
    return [f"{same} and {name} are equal" for same, name in pairs if same != name]
