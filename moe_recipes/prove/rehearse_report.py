"""The rehearsal as text: bytes a rank, one line for each kind of parameter, and what is wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30
PROBLEMS_SHOWN = 20
COLUMNS = ("parameter", "gradient", "optimizer", "buffer", "read")


def report_lines(record: Mapping[str, Any], *, optimizer: str) -> Iterator[str]:
    """Lines of the report of a ``rehearse.json``."""
    ranks = record["ranks"]
    yield f"rehearsal of {record['recipe']}: {record['model']} on {record['num_ranks']} ranks ({record['mesh']})"
    yield f"{record['num_parameters']:,} parameters in {len(record['parameters']):,} tensors; optimizer {optimizer}"
    yield f"source: {record['source']}"
    if left := record["source_keys_left_out"]:
        yield f"  {len(left):,} keys of the source are not in the model, first {left[0]}"
    yield f"built as {len(ranks)} of the {record['num_ranks']} ranks, in {record['seconds']:.0f} s"
    yield ""
    yield "exact bytes, in GiB     " + "".join(f"{name:>12}" for name in COLUMNS) + "       slices"
    for rank in ranks:
        values = [rank[f"{name}_bytes"] / GIB for name in COLUMNS]
        yield f"rank {rank['rank']:<19}" + "".join(f"{value:12.4f}" for value in values) + f"{rank['read_slices']:13,}"
    held = {name: {rank[f"{name}_bytes"] for rank in ranks} for name in COLUMNS}
    most = sum(max(held[name]) for name in ("parameter", "gradient", "optimizer", "buffer"))
    yield f"the fullest rank holds {most / GIB:.2f} GiB ({most:,} bytes) before activations and gathered layers"
    yield ""
    yield "placement of every parameter (rows a rank: fewest - most)"
    yield from _placements(record["parameters"])
    if record["problems"]:
        yield ""
        yield f"{len(record['problems'])} problems"
        yield from (f"  {problem}" for problem in record["problems"][:PROBLEMS_SHOWN])
        if len(record["problems"]) > PROBLEMS_SHOWN:
            yield f"  ... and {len(record['problems']) - PROBLEMS_SHOWN} more in the JSON"


def _placements(parameters: list[dict[str, Any]]) -> Iterator[str]:
    kinds: dict[tuple[Any, ...], int] = defaultdict(int)
    for one in parameters:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", one["name"])
        kinds[name, tuple(one["shape"]), one["dtype"], one["placement"], tuple(one["rows_a_rank"])] += 1
    for (name, shape, dtype, placement, (fewest, most)), count in kinds.items():
        rows = f"{most}" if fewest == most else f"{fewest} - {most}"
        yield f"  {count:4} x {name} {list(shape)} {dtype}: {placement}; {rows}"
