"""The all-to-all dispatcher: one row per (token, rank), however many of that rank's experts the token picked.

Four experts on two ranks, top-3. Token a of rank 0 picks E0, E2, E3; token b of rank 1 picks E0, E1, E3:

    rank                   0                              1
    experts             E0    E1                       E2    E3
    tokens                 a                              b
    sent               a -> 0 {E0}, a -> 1 {E2, E3}   b -> 0 {E0, E1}, b -> 1 {E3}       4 rows, not 6
    received           a {E0}      b {E0, E1}         a {E2, E3}      b {E3}
    computed           w0*E0(a)    w0*E0(b)+w1*E1(b)  w2*E2(a)+w3*E3(a)   w3*E3(b)
    sent back          one row each; the sender adds a token's rows up

A row travels with its routing weights, which are applied on the receiving rank before the sum, so the way back also
carries one row per (token, rank). With 8 experts a token over 8 ranks that is 5.3 rows instead of 8 under even routing.

What depends on the routing alone is a ``DispatchPlan`` of integers. It is made once a layer call, with one
device-to-host sync for the exchange sizes, and kept for recomputation. Transport and expert computation take it as
an argument, so another transport or kernel replaces either without the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moe_recipes.kernels.rows import RowMap, sum_rows, take_rows
from moe_recipes.moe.experts import routed_experts
from moe_recipes.moe.recompute import kept_once

NAME = "moe_recipes_all_to_all"


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of rows. Its backward is the same exchange with the counts swapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.reverse = receive, send, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.reverse
        return _ExchangeRows.apply(grad, send, receive, group), None, None, None


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Where every row goes and comes from. Integers only; counts are on the host."""

    sent: RowMap
    """S sent rows, rank-major, over T tokens x P ranks."""

    send_counts: list[int]
    recv_counts: list[int]
    num_routed_rows: int
    """(row, expert) pairs that this rank computes."""

    expert_RK: Tensor
    """Local expert of each slot of each received row; ``e`` where the slot's expert is on another rank."""


def make_plan(top_k_index_TK: Tensor, *, num_local_experts: int, group: dist.ProcessGroup) -> DispatchPlan:
    """Agree with the other ranks of ``group`` on who sends which tokens where. Every rank must call it.

    Args:
        top_k_index_TK: int64 global expert ids, local tokens; T may be 0.
    """
    num_ranks, (num_tokens, top_k) = dist.get_world_size(group), top_k_index_TK.shape
    device = top_k_index_TK.device
    rank_TK = top_k_index_TK // num_local_experts
    ranks_P11 = torch.arange(num_ranks, device=device)[:, None, None]
    slots_PT = (rank_TK == ranks_P11).sum(dim=2)  # experts of rank p that token t picked
    goes_PT = slots_PT > 0
    counts_P2 = torch.stack([goes_PT.sum(1), slots_PT.sum(1)], dim=1)
    received_P2 = torch.empty_like(counts_P2)
    dist.all_to_all_single(received_P2, counts_P2, group=group)

    # All that does not need the counts on the host comes before the wait for them: afterwards the device has nothing
    # to do until it is told more. Places beyond the rows that are sent are filled too, and cut off below.
    most_rows = num_tokens * min(num_ranks, top_k)
    row_PT = goes_PT.flatten().cumsum(0).sub_(1).view(num_ranks, num_tokens)
    slot_PT = torch.arange(num_tokens, device=device) * num_ranks + torch.arange(num_ranks, device=device)[:, None]
    slot_S = torch.zeros(most_rows + 1, dtype=torch.int64, device=device)
    # Pairs that are not sent write to a spare last place.
    slot_S = slot_S.scatter_(0, torch.where(goes_PT, row_PT, most_rows).flatten(), slot_PT.flatten())[:most_rows]
    row_TP = torch.where(goes_PT, row_PT, -1).T.contiguous()
    token_S, rank_S = slot_S // num_ranks, slot_S % num_ranks
    here_SK = rank_TK[token_S] == rank_S[:, None]
    expert_SK = torch.where(here_SK, top_k_index_TK[token_S] % num_local_experts, num_local_experts)

    # The one device-to-host sync of the layer: the row exchange needs its counts on the host.
    sent_host, received_host = torch.stack([counts_P2, received_P2]).tolist()
    send_counts, recv_counts = [n for n, _ in sent_host], [n for n, _ in received_host]
    num_sent = sum(send_counts)
    expert_RK = expert_SK.new_empty(sum(recv_counts), top_k)
    dist.all_to_all_single(expert_RK, expert_SK[:num_sent], recv_counts, send_counts, group=group)
    sent = RowMap(slot_N=slot_S[:num_sent], row_TJ=row_TP)
    return DispatchPlan(
        sent=sent,
        send_counts=send_counts,
        recv_counts=recv_counts,
        num_routed_rows=sum(n for _, n in received_host),
        expert_RK=expert_RK,
    )


class AllToAllDispatcher(EPImplementation):
    """``dispatch``, experts, ``combine``; registered with Transformers under ``NAME``."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(f"{NAME} does not split tokens over tensor-parallel ranks; set tp_size=1")
        self.experts = experts

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        plan = kept_once(lambda: self.plan(top_k_index))
        x_RD, weight_RK = self.dispatch(hidden_states, top_k_weights, plan)
        return self.combine(self.compute(x_RD, weight_RK, plan), plan)

    def plan(self, top_k_index_TK: Tensor) -> DispatchPlan:
        return make_plan(top_k_index_TK, num_local_experts=self.num_local_experts, group=self.ep_mesh.get_group())

    def dispatch(self, x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """Rows and routing weights of the tokens that picked an expert of this rank: ``[R, D]``, ``[R, K]``."""
        group, counts = self.ep_mesh.get_group(), (plan.send_counts, plan.recv_counts)
        x_RD = _ExchangeRows.apply(take_rows(x_TD, plan.sent), *counts, group)
        weight_RK = _ExchangeRows.apply(take_rows(weight_TK, plan.sent), *counts, group)
        return x_RD, weight_RK

    def compute(self, x_RD: Tensor, weight_RK: Tensor, plan: DispatchPlan) -> Tensor:
        """Each received row's weighted sum over this rank's experts: ``[R, D]``."""
        if self.experts.config._experts_implementation == "moe_recipes":
            return routed_experts(self.experts, x_RD, plan.expert_RK, weight_RK, num_rows=plan.num_routed_rows)
        here_RK = plan.expert_RK < self.num_local_experts
        if len(x_RD) == 0:  # keep autograd and the reduction over ranks alive; see expert_mlp
            none = plan.expert_RK.new_zeros(1, plan.expert_RK.shape[1])
            return self.experts_forward(x_RD.sum(0, keepdim=True), none, weight_RK.sum(0, keepdim=True))[:0]
        return self.experts_forward(x_RD, plan.expert_RK, weight_RK * here_RK)

    def combine(self, y_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """Rows back to the ranks that sent them, and each token's rows added up: ``[T, D]``."""
        y_SD = _ExchangeRows.apply(y_RD, plan.recv_counts, plan.send_counts, self.ep_mesh.get_group())
        return sum_rows(y_SD, plan.sent)


EPImplementationInterface.register(NAME, AllToAllDispatcher)
