"""The proof as text: one block a layout, one line a comparison."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from moe_recipes.launch.words import ERROR_PREFIX


def say_error(text: str, exit_code: int, *, as_json: bool) -> int:
    """One line on stderr, or an object on stdout, as every command does. Returns the exit code."""
    if as_json:
        print(json.dumps({"error": text, "exit_code": exit_code}))
    else:
        print(f"{ERROR_PREFIX}{text}", file=sys.stderr)
    return exit_code


def report_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the report of a ``prove.json``."""
    facts = record["model"]
    yield f"proof of {record['recipe']}: {facts['class']} with {facts['parameters']:,} random parameters, float32"
    yield "against one process of eager Transformers, one document at a time"
    yield from (f"note: {note}" for note in record["notes"])
    for layout in record["layouts"]:
        yield ""
        yield f"{layout['layout']}   ({layout['seconds']:.0f} s)"
        for check in layout["checks"]:
            word = "ok  " if check["passed"] else "FAIL"
            yield f"  {word} {check['name']:<24} {_error(check):<20} {check['found']}"
    failed = [
        (layout["num_ranks"], check)
        for layout in record["layouts"]
        for check in layout["checks"]
        if not check["passed"]
    ]
    yield ""
    yield f"{len(failed)} comparisons failed, in {record['seconds']:.0f} s"
    for name in dict.fromkeys(check["name"] for _, check in failed):
        ranks = ", ".join(str(number) for number, check in failed if check["name"] == name)
        first = next(check for _, check in failed if check["name"] == name)
        yield f"  {name} differs on {ranks} ranks: {first['found']}"


def _error(check: Mapping[str, Any]) -> str:
    if check["limit"] is None:
        return "exact"
    value = "infinite" if check["value"] is None else f"{check['value']:.1e}"
    return f"{value} of {check['limit']:.0e}"
