"""A dispatcher without a host wait and without a collective: rows are stored straight into the other ranks' memory.

What travels is what ``all_to_all`` sends, one row a (token, rank) each way, and every sum is the same, bit for bit. Two
things differ. Who goes where is found on the device from everybody's choices, so no count comes to the host. And
tensors of routed rows have a size that is known before the routing: what the layer had on this rank in its fullest
recent step, times ``capacity_factor``. So what the expert block keeps is close to the actual size without an arena that
all layers fill: the grouped product cannot write to a place that only the device knows, and every layer would have to
copy its largest tensor once more.

A layer whose routing needs more rows than that computes a wrong result, in bounds, and the count on the device tells.
So the dispatcher works this way only inside a ``RoutedRows``, whose owner reads the counts before it uses any gradient
and computes the step again by all-to-all where rows had no room. The first step of a process goes by all-to-all too,
which counts on the host and fits any routing. So does everything outside, and everything without gradients.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementationInterface

from moe_recipes.kernels.expert_order import expert_order
from moe_recipes.kernels.peer_rows import collect_rows, combine_rows, push_rows
from moe_recipes.kernels.rows import RowMap, gather_rows
from moe_recipes.kernels.triton import use_triton
from moe_recipes.moe.all_to_all import AllToAllDispatcher, DispatchPlan
from moe_recipes.moe.experts import fused_activation
from moe_recipes.moe.gated_experts import Activation, _linear, _weight_gradient
from moe_recipes.moe.recompute import kept_once
from moe_recipes.moe.symmetric_memory import Buffers

NAME = "moe_recipes_symmetric"

_RECENT_STEPS = 16
_STEPS_OF_SHARE = 16
"""Sizes go in steps of this part of an even share, so that the allocator sees few different ones."""


class RoutedRows:
    """One step's use of the dispatcher, as a context: the forward passes and their backward passes belong inside.

    Args:
        capacity_factor: room over what a layer had in its fullest recent step; None: all-to-all, whatever was before.
    """

    current: RoutedRows | None = None
    """Of this process: backward, and with it recomputation, runs in threads of the autograd engine."""

    def __init__(self, capacity_factor: float | None) -> None:
        self.capacity_factor = capacity_factor
        self.room: dict[SymmetricDispatcher, int] = {}
        self.counted: dict[SymmetricDispatcher, int] = {}

    def __enter__(self) -> RoutedRows:
        RoutedRows.current = self
        return self

    def __exit__(self, *_: object) -> None:
        RoutedRows.current = None

    def counts(self, device: torch.device) -> Tensor:
        """Rows that each layer needed in its fullest call, float32 on the device. No host wait."""
        found = [layer.most_rows for layer in self.room]
        return torch.cat(found).float() if found else torch.zeros(0, device=device)

    def missing(self, counts: list[float]) -> float:
        """Rows without room, given ``counts`` on the host. 0: all that was computed on this rank is exact."""
        return sum(max(0.0, count - room) for count, room in zip(counts, self.room.values(), strict=True))

    def learn(self, counts: list[float]) -> None:
        """Size the next steps by this one, which was exact on every rank."""
        for layer, count in [*zip(self.room, counts, strict=True), *self.counted.items()]:
            layer.recent.append(int(count))


_all_buffers: dict[Any, Buffers] = {}


def _buffers(x_TD: Tensor, weight_TK: Tensor, group: dist.ProcessGroup) -> Buffers:
    """The group's buffers for tensors like these. Made, or made larger, by all its ranks in the same call, so ranks may
    have fewer tokens than others, but the first one with more must not be alone."""
    num_tokens, top_k = weight_TK.shape
    key = (group.group_name, x_TD.device, x_TD.shape[1], top_k, x_TD.dtype, weight_TK.dtype)
    buffers = _all_buffers.get(key)
    if buffers is None or buffers.room < num_tokens:
        room = torch.tensor([num_tokens], device=x_TD.device)
        dist.all_reduce(room, op=dist.ReduceOp.MAX, group=group)
        buffers = _all_buffers[key] = Buffers(
            group, x_TD.device, room=int(room), width=x_TD.shape[1], top_k=top_k, dtype=x_TD.dtype,
            weight_dtype=weight_TK.dtype,
        )  # fmt: skip
    return buffers


class _SymmetricExperts(torch.autograd.Function):
    """Dispatch, gated experts and combine. Keeps what ``moe/gated_experts.py`` keeps; rows travel again in the
    backward pass instead of being kept by the ranks that received them."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, up: Tensor, down: Tensor, index_TK: Tensor,
        dispatcher: SymmetricDispatcher, wanted_rows: int,
    ) -> Tensor:  # fmt: skip
        buffers, experts = _buffers(x_TD, weight_TK, dispatcher.ep_mesh.get_group()), len(down)
        transposed, activation = dispatcher.experts.is_transposed, dispatcher.activation
        me, own, to = buffers.rank, buffers.own, buffers.to
        push_rows(
            [(x_TD, to["rows"])], index_TK, weight_TK, to["weight"], to["index"], me=me, num_local_experts=experts
        )
        buffers.memory.meet()
        rows, ends_e = kept_once(lambda: _order(buffers, dispatcher, wanted_rows))
        hidden_NH = _linear(gather_rows(own["rows"], rows).to(up.dtype), up, ends_e, transposed=transposed)
        y_ND = _linear(activation.forward(hidden_NH), down, ends_e, transposed=transposed).to(x_TD.dtype)
        combine_rows(y_ND, rows.row_TJ, to["back"], me=me, weight_GK=own["weight"])
        buffers.memory.meet()
        ctx.save_for_backward(x_TD, weight_TK, up, down, index_TK, hidden_NH)
        ctx.layout = buffers, rows, ends_e, transposed, activation
        out, _ = collect_rows(own["back"], index_TK, num_ranks=buffers.num_ranks, num_local_experts=experts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, up, down, index_TK, hidden_NH = ctx.saved_tensors
        buffers, rows, ends_e, transposed, activation = ctx.layout
        me, own, to, experts = buffers.rank, buffers.own, buffers.to, len(down)
        travelling = [(x_TD, to["rows"]), (grad_TD.to(x_TD.dtype), to["grads"])]
        push_rows(travelling, index_TK, weight_TK, to["weight"], me=me, num_local_experts=experts)
        buffers.memory.meet()
        grad_y_ND = gather_rows(own["grads"], rows).to(down.dtype)
        grad_act_NF = _linear(grad_y_ND, down, ends_e, transposed=not transposed)
        act_NF, grad_hidden_NH, grad_weight_GK = activation.weighted_backward(
            grad_act_NF, hidden_NH, own["weight"], rows.slot_N
        )
        grad_down = grad_up = None
        if ctx.needs_input_grad[3]:
            grad_down = _weight_gradient(act_NF, grad_y_ND, down, ends_e, transposed=transposed)
        del grad_act_NF, act_NF, grad_y_ND
        if ctx.needs_input_grad[2]:
            x_ND = gather_rows(own["rows"], rows).to(up.dtype)
            grad_up = _weight_gradient(x_ND, grad_hidden_NH, up, ends_e, transposed=transposed)
            del x_ND
        grad_x_ND = _linear(grad_hidden_NH, up, ends_e, transposed=not transposed).to(x_TD.dtype)
        combine_rows(
            grad_x_ND, rows.row_TJ, to["back"], me=me, grad_weight_GK=grad_weight_GK, grad_to=to["grad_weight"]
        )
        buffers.memory.meet()
        grad_x, grad_weight = collect_rows(
            own["back"], index_TK, num_ranks=buffers.num_ranks, num_local_experts=experts, grad_GK=own["grad_weight"]
        )
        return grad_x, grad_weight, grad_up, grad_down, None, None, None


def _order(buffers: Buffers, dispatcher: SymmetricDispatcher, wanted_rows: int) -> tuple[RowMap, Tensor]:
    """This rank's routed rows in expert order, from the choices that all ranks have pushed."""
    index_GK, experts = buffers.own["index"], dispatcher.num_local_experts
    worst = len(index_GK) * min(index_GK.shape[1], experts)
    step = max(1, len(index_GK) * index_GK.shape[1] // buffers.num_ranks // _STEPS_OF_SHARE)
    room = min(worst, step * -(-max(1, wanted_rows) // step))
    rooms = RoutedRows.current.room  # type: ignore[union-attr]
    rooms[dispatcher] = min(room, rooms.get(dispatcher, room))  # sizes go up in larger steps once buffers have grown
    slot_N, row_GK, ends_e = expert_order(
        index_GK, dispatcher.most_rows, first=buffers.rank * experts, num_experts=experts, room=room
    )
    if not use_triton(index_GK):  # on the CPU the count is at hand, and only the rows that are there are computed
        slot_N = slot_N[: int(ends_e[-1])]
    return RowMap(slot_N=slot_N, row_TJ=row_GK), ends_e


class SymmetricDispatcher(AllToAllDispatcher):
    """As the all-to-all dispatcher, and the faster one inside a ``RoutedRows``; registered with Transformers under
    ``NAME``.

    Raises:
        ValueError: experts that ``moe/gated_experts.py`` does not compute, or experts with biases.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        activation = fused_activation(experts)
        if activation is None or experts.has_bias:
            raise ValueError(f"ep_implementation {NAME} does not compute {type(experts).__name__}")
        self.activation: Activation = activation
        self.recent: deque[int] = deque(maxlen=_RECENT_STEPS)
        """Routed rows on this rank in the fullest call of each of the last steps."""

        self.most_rows = torch.empty(0)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Kept, since a recomputed layer must take the way of its forward pass.
        wanted_rows = kept_once(lambda: self._wanted_rows(hidden_states.device))
        if wanted_rows is None:
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        experts = self.experts
        up = experts.gate_up_proj if experts.has_gate else experts.up_proj
        return _SymmetricExperts.apply(
            hidden_states, top_k_weights, up, experts.down_proj, top_k_index, self, wanted_rows
        )

    def _wanted_rows(self, device: torch.device) -> int | None:
        """None: all-to-all. Every rank comes to the same way: all have been through the same steps."""
        step = RoutedRows.current
        if step is None or step.capacity_factor is None or not self.recent or not torch.is_grad_enabled():
            return None
        if self not in step.room:
            self.most_rows = torch.zeros(1, dtype=torch.int32, device=device)
        return math.ceil(max(self.recent) * step.capacity_factor)

    def plan(self, top_k_index_TK: Tensor) -> DispatchPlan:
        plan = super().plan(top_k_index_TK)
        step = RoutedRows.current
        if step is not None and torch.is_grad_enabled():
            step.counted[self] = max(plan.num_routed_rows, step.counted.get(self, 0))
        return plan


EPImplementationInterface.register(NAME, SymmetricDispatcher)
