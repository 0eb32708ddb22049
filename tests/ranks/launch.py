"""``run_on_ranks`` for the tests: a function on several gloo ranks of this machine."""

from __future__ import annotations

from moe_recipes.prove.ranks import TIMEOUT_S, RanksFailedError, run_on_ranks

__all__ = ["TIMEOUT_S", "RanksFailedError", "run_on_ranks"]
