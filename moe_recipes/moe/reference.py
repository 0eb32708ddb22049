"""The slow truth: short enough to check by eye. Every fast path is tested against it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def experts_reference(
    x_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Weighted sum of each token's K SwiGLU expert outputs, accumulated in float32: ``[T, D]``."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert in range(len(gate_up_E2FD)):
        token, slot = (top_k_index_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up_E2FD[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EDF[expert])
        out_TD = out_TD.index_add(0, token, y.float() * top_k_weights_TK[token, slot, None].float())
    return out_TD.to(x_TD.dtype)


def dispatch_reference(
    x_TD: Tensor, top_k_index_TK: Tensor, *, num_local_experts: int, group: dist.ProcessGroup
) -> list[Tensor]:
    """What each expert of this rank receives, by gathering every token of every rank: one ``[n, D]`` an expert.

    Rows come in order of (sending rank, token). No gradient. Costs P times the memory of a real dispatch.
    """
    sizes: list[int | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, len(x_TD), group=group)
    received = []
    gathered: list[tuple[Tensor, Tensor] | None] = [None] * len(sizes)
    dist.all_gather_object(gathered, (x_TD.detach().cpu(), top_k_index_TK.cpu()), group=group)
    first = dist.get_rank(group) * num_local_experts
    for expert in range(first, first + num_local_experts):
        rows = [x[(index == expert).any(dim=1)] for x, index in gathered if len(x)]  # type: ignore[misc]
        received.append(torch.cat(rows) if rows else x_TD.new_empty(0, x_TD.shape[1]))
    return received
