"""How many tokens each expert of each layer gets, counted where the routing arrives, on the device."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_recipes.moe.recompute import is_replaying

_counted: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("counted tokens", default=None)


@contextlib.contextmanager
def count_only(tokens: Tensor | None) -> Iterator[None]:
    """Inside, only these tokens count in loads and router losses; with another such call around it, those of both.

    Args:
        tokens: bool, one for each token that passes a router ``[T]`` or ``[B, S]``; None for all.
    """
    outer = _counted.get()
    inner = tokens.flatten() if tokens is not None else outer
    if outer is not None and tokens is not None:
        inner = outer & tokens.flatten()
    token = _counted.set(inner)
    try:
        yield
    finally:
        _counted.reset(token)


def counted_tokens() -> Tensor | None:
    """bool ``[T]``: the tokens that count here; None for all."""
    return _counted.get()


class ExpertLoad:
    """Token counts of every watched layer since the last ``collect``; one small kernel a layer, no host sync."""

    def __init__(self, experts: Mapping[int, nn.Module], *, num_experts: int, device: torch.device) -> None:
        self.layers = sorted(experts)
        self.counts_LE = torch.zeros(len(self.layers), num_experts, dtype=torch.int64, device=device)
        for index, layer in enumerate(self.layers):
            experts[layer].register_forward_pre_hook(self._counter(index), with_kwargs=True)

    def _counter(self, index: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled() and not is_replaying():
                top_k_index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                real_T, one_TK = counted_tokens(), torch.ones_like(top_k_index)
                if real_T is not None:
                    one_TK = real_T[:, None].expand_as(top_k_index).to(top_k_index.dtype)
                self.counts_LE[index].scatter_add_(0, top_k_index.flatten(), one_TK.flatten())

        return count

    def collect(self) -> Tensor:
        """Counts summed over all ranks, int64 on the CPU ``[layers, E]``, and start again. Every rank must call it."""
        counts = self.counts_LE.clone().cpu()
        dist.all_reduce(counts)
        self.counts_LE.zero_()
        return counts


def max_violations(counts_LE: Tensor) -> Tensor:
    """Of each layer, its busiest expert's load over its mean load, minus 1: float64 ``[layers]``. 0 is perfect balance.

    A layer without any token has 0.
    """
    mean_L = counts_LE.double().mean(dim=1)
    return torch.where(mean_L > 0, counts_LE.max(dim=1).values / mean_L.clamp(min=1e-9) - 1, 0.0)


def max_violation(counts_LE: Tensor) -> float:
    """``max_violations`` of the worst layer."""
    return float(max_violations(counts_LE).max())


def dead_experts(counts_LE: Tensor) -> Tensor:
    """How many experts of each layer got no token: int64 ``[layers]``."""
    return (counts_LE == 0).sum(dim=1)
