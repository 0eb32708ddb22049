"""Triton where it is there. CPU builds of torch come without it; every kernel has a torch reference beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:

    def _not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    triton = SimpleNamespace(jit=_not_compiled)
    tl = SimpleNamespace(constexpr=int)
    HAVE_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs for this tensor; with TRITON_INTERPRET=1 also on the CPU, for tests."""
    return HAVE_TRITON and (tensor.is_cuda or INTERPRETED)


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


__all__ = ["HAVE_TRITON", "INTERPRETED", "power_of_two", "tl", "triton", "use_triton"]
