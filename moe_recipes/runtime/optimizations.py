"""What is applied to a model and what is not, with the reason, for the one line that says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Optimization(NamedTuple):
    name: str
    applied: bool
    reason: str


def describe(found: Iterable[Optimization]) -> str:
    """``name: applied (reason); name: not applied (reason)``."""
    return "; ".join(f"{o.name}: {'applied' if o.applied else 'not applied'} ({o.reason})" for o in found)
