"""Activation checkpointing that never routes twice.

A recomputed layer must not choose experts again: it would cost the router, the sort and the count exchange a second
time, and where a kernel is not bitwise repeatable a token near a tie would go to another expert in the backward pass
than in the forward pass. So the router's outputs and the dispatch plan (integers) are kept from the forward pass and
handed back while the layer is recomputed. The rows themselves are rebuilt with the kept plan.

The router's input is the one large tensor that its backward needs. It is not kept: recomputation makes it again
on its way to the experts, and the router's backward, which runs after theirs, picks it up from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_current = threading.local()  # backward, and with it recomputation, runs in threads of the autograd engine


class _Kept:
    """What one checkpointed layer call keeps, in the order it was made."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.cursor = 0
        self.router_inputs: dict[int, Tensor] = {}


class _Scope:
    """Context in which a checkpointed layer runs: first to record, later, ``replaying``, to hand back."""

    def __init__(self, kept: _Kept, *, replaying: bool) -> None:
        self.kept, self.replaying = kept, replaying
        self.outer: list[_Scope | None] = []

    def __enter__(self) -> None:
        self.outer.append(getattr(_current, "scope", None))
        self.kept.cursor = 0
        _current.scope = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.scope = self.outer.pop()


def checkpoint_contexts() -> tuple[_Scope, _Scope]:
    """``context_fn`` of ``torch.utils.checkpoint``: contexts of the forward pass and of its recomputation."""
    kept = _Kept()
    return _Scope(kept, replaying=False), _Scope(kept, replaying=True)


def is_replaying() -> bool:
    """True while a checkpointed layer is recomputed in the backward pass."""
    scope = getattr(_current, "scope", None)
    return scope is not None and scope.replaying


def kept_once(make: Callable[[], Any]) -> Any:
    """``make()``, once a checkpointed layer call: recomputation gets the value of the forward pass.

    The value must need no gradient.
    """
    scope: _Scope | None = getattr(_current, "scope", None)
    if scope is None:
        return make()
    kept = scope.kept
    if not scope.replaying:
        kept.values.append(make())
    value = kept.values[kept.cursor]
    kept.cursor += 1
    return value


class _RouterInput:
    """Stands for the router's input among its saved tensors."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def _route(router_forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    scope: _Scope | None = getattr(_current, "scope", None)
    if scope is None:
        return router_forward(hidden, *args, **kwargs)
    kept, call = scope.kept, scope.kept.cursor
    kept.cursor += 1
    if scope.replaying:
        kept.router_inputs[call] = hidden.detach()
        return tuple(
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
            for value in kept.values[call]
        )

    # The graph holds both hooks for as long as it holds a saved tensor, so they must not hold ``hidden`` themselves.
    identity = (hidden.data_ptr(), hidden.numel(), hidden.dtype) if hidden.is_contiguous() else None

    def pack(saved: Tensor) -> Tensor | _RouterInput:
        same = saved.is_contiguous() and (saved.data_ptr(), saved.numel(), saved.dtype) == identity
        return _RouterInput(saved.shape) if same else saved

    def unpack(saved: Tensor | _RouterInput) -> Tensor:
        return kept.router_inputs[call].reshape(saved.shape) if isinstance(saved, _RouterInput) else saved

    # Inside these hooks the checkpoint does not see what the router saves, so it does not miss it when the router
    # is not run again.
    with saved_tensors_hooks(pack, unpack):
        outputs = router_forward(hidden, *args, **kwargs)
    kept.values.append(outputs)
    return outputs


class _RouteOnce:
    """A router's forward. An object and not a closure: it is copied and pickled together with its router."""

    def __init__(self, router: nn.Module) -> None:
        self.router = router
        self.replaced = router.__dict__.get("forward")

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        router_forward = self.replaced or partial(type(self.router).forward, self.router)
        return _route(router_forward, hidden, *args, **kwargs)


def route_once(router: nn.Module) -> None:
    """Make a router module hand back its first outputs when its layer is recomputed. Changes nothing elsewhere."""
    if not isinstance(router.forward, _RouteOnce):
        router.forward = _RouteOnce(router)  # type: ignore[method-assign]
