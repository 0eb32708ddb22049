"""How many tokens each expert of each layer gets, counted where the routing arrives, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_recipes.moe.recompute import is_replaying


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
                chosen = top_k_index.flatten()
                self.counts_LE[index].scatter_add_(0, chosen, torch.ones_like(chosen))

        return count

    def collect(self) -> Tensor:
        """Counts summed over all ranks, int64 on the CPU ``[layers, E]``, and start again. Every rank must call it."""
        counts = self.counts_LE.clone().cpu()
        dist.all_reduce(counts)
        self.counts_LE.zero_()
        return counts


def max_violation(counts_LE: Tensor) -> float:
    """Busiest expert's load over the mean load, minus 1, in the worst layer. 0 is perfect balance."""
    mean_L = counts_LE.double().mean(dim=1).clamp(min=1e-9)
    return float((counts_LE.max(dim=1).values / mean_L).max() - 1)
