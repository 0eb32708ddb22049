"""What fits: the most rows at the recipe's sequence, and the longest sequence of one row.

Each try is a set of processes of its own, since a process that ran out of memory once is no fair judge of the next
size. A try that fails for another reason than memory ends the search: it says nothing about size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from moe_recipes.config.errors import InfrastructureError
from moe_recipes.config.recipe import Recipe

MAX_ROWS = 64
SEQUENCE_STEP, MAX_SEQUENCE = 1024, 32 * 1024
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)

Measure = Callable[[Recipe], dict[str, Any]]


def largest_rows(recipe: Recipe, measure: Measure) -> int:
    """The most rows a rank up to ``MAX_ROWS``; 0 where not even one fits."""

    def fits(rows: int) -> bool:
        train = dataclasses.replace(recipe.train, micro_batch_size=rows)
        return _fits(measure(dataclasses.replace(recipe, train=train)))

    return largest(fits, limit=MAX_ROWS)


def longest_sequence(recipe: Recipe, measure: Measure) -> int:
    """The longest sequence of one row in tokens, a multiple of ``SEQUENCE_STEP`` up to ``MAX_SEQUENCE``; 0 for none."""

    def fits(steps: int) -> bool:
        train = dataclasses.replace(recipe.train, micro_batch_size=1)
        data = dataclasses.replace(recipe.data, seq_len=steps * SEQUENCE_STEP)
        return _fits(measure(dataclasses.replace(recipe, train=train, data=data)))

    return SEQUENCE_STEP * largest(fits, limit=MAX_SEQUENCE // SEQUENCE_STEP)


def largest(fits: Callable[[int], bool], *, limit: int) -> int:
    """The largest whole number from 1 to ``limit`` that fits, 0 if 1 does not: doubled until one does not, then halved
    in. What fits must fit at every smaller number."""
    good, bad = 0, limit + 1
    while bad - good > 1:
        tried = min(max(1, 2 * good), limit) if bad > limit else (good + bad) // 2
        if fits(tried):
            good = tried
        else:
            bad = tried
    return good


def _fits(result: dict[str, Any]) -> bool:
    """Raises:
    InfrastructureError: the arm failed for another reason than memory, or is not installed.
    """
    why = result.get("failed") or result.get("missing")
    if why and ("missing" in result or not OUT_OF_MEMORY.search(why)):
        raise InfrastructureError(f"--sweep: {result['arm']} does not run: {why}")
    return not why
