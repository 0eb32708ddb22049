"""Expert computation: rows sorted by expert once, two grouped matrix products, weighted sum back.

Works on the experts modules of Transformers (``use_experts_implementation``), through what the decorator declares of
them: gate or none, bias or none, transposed weights, interleaved gates, a norm after the expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

from moe_recipes.kernels.clamped_swiglu import ClampedSwiglu, clamped_swiglu_reference
from moe_recipes.kernels.relu2 import relu2
from moe_recipes.kernels.rows import RowMap, make_row_map, sum_rows, take_rows
from moe_recipes.kernels.swiglu import swiglu
from moe_recipes.moe.gated_experts import RELU2, SWIGLU, Activation, Biases, clamped, gated_experts
from moe_recipes.moe.recompute import kept_once


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Rows in expert-major order. Integers only."""

    rows: RowMap
    """N routed rows over the T x K slots they came from."""

    ends_e: Tensor
    """int32: one past the last row of each local expert."""

    expert_N: Tensor
    """Local expert of each row."""


def sort_by_expert(local_index_TK: Tensor, *, num_experts: int, num_rows: int | None = None) -> ExpertOrder:
    """Order the routed rows by expert, stable, so equal input gives equal order.

    Args:
        local_index_TK: int64 ids of experts on this rank; ``num_experts`` or more marks a slot that is not here.
        num_rows: how many slots are here, where the host knows it; otherwise all T * K.
    """
    num_tokens, num_slots = local_index_TK.shape
    sorted_N, order_N = local_index_TK.flatten().to(torch.int32).sort(stable=True)
    experts = torch.arange(num_experts, device=sorted_N.device, dtype=torch.int32)
    ends_e = torch.searchsorted(sorted_N, experts, right=True, out_int32=True)
    if num_rows is not None:
        sorted_N, order_N = sorted_N[:num_rows], order_N[:num_rows]
    return ExpertOrder(
        rows=make_row_map(order_N, num_tokens=num_tokens, num_slots=num_slots), ends_e=ends_e, expert_N=sorted_N
    )


def _grouped_linear(
    x_ND: Tensor, weight: Tensor, order: ExpertOrder, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    """Row n times its own expert's weight, ``[e, out, in]`` or, transposed, ``[e, in, out]``."""
    weight_eIO = weight if transposed else weight.transpose(-2, -1)
    out = F.grouped_mm(x_ND.to(weight.dtype), weight_eIO, offs=order.ends_e)
    return out if bias is None else out + bias[order.expert_N.long()]


def _is_swiglu(experts: nn.Module) -> bool:
    """True if the activation is ``silu(gate) * up`` over halves."""
    if not (experts.has_gate and experts.is_concatenated and type(experts)._apply_gate is _default_apply_gate):
        return False  # a family with a gate of its own need not have an act_fn
    return isinstance(experts.act_fn, nn.SiLU) or type(experts.act_fn).__name__ == "SiLUActivation"


def _is_relu2(experts: nn.Module) -> bool:
    return not experts.has_gate and type(experts.act_fn).__name__ == "ReLUSquaredActivation"


@functools.cache
def _is_clamped(kind: type[nn.Module], alpha: float, limit: float) -> bool:
    """True if the class's gate is the one that ``kernels/clamped_swiglu.py`` computes, on values around its limits."""
    with torch.device("cpu"), torch.no_grad():
        row = torch.linspace(-2 * limit, 2 * limit, 34).view(1, 34)
        numbers = ClampedSwiglu(alpha=alpha, limit=limit)
        wanted = clamped_swiglu_reference(row, torch.zeros_like(row), torch.zeros(1), numbers)
        return torch.allclose(kind._apply_gate(SimpleNamespace(alpha=alpha, limit=limit), row), wanted, atol=1e-5)


def fused_activation(experts: nn.Module) -> Activation | None:
    """What the one autograd function of ``moe/gated_experts.py`` computes these experts with; None where it cannot."""
    if getattr(experts, "has_post_expert_norm", False):
        return None
    if not experts.has_bias:
        return SWIGLU if _is_swiglu(experts) else RELU2 if _is_relu2(experts) else None
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if not experts.has_gate or experts.is_concatenated or alpha is None or limit is None:
        return None
    return clamped(alpha=alpha, limit=limit) if _is_clamped(type(experts), alpha, limit) else None


def _activate(experts: nn.Module, hidden_NF: Tensor) -> Tensor:
    """The module's own activation, through the fused kernel where there is one."""
    if _is_swiglu(experts):
        return swiglu(hidden_NF)
    if _is_relu2(experts):
        return relu2(hidden_NF)
    return experts._apply_gate(hidden_NF) if experts.has_gate else experts.act_fn(hidden_NF)


def expert_mlp(experts: nn.Module, x_ND: Tensor, order: ExpertOrder) -> Tensor:
    """Each row through its own expert: ``[N, D]``.

    No row at all still runs one row of zeros: every rank must own a gradient for every expert, or the reduction over
    the ranks that share these experts would wait for one that never comes.
    """
    num_rows = len(x_ND)
    if num_rows == 0:
        one = torch.ones_like(order.ends_e)
        order = ExpertOrder(rows=order.rows, ends_e=one, expert_N=one.new_zeros(1))
        x_ND = x_ND.sum(dim=0, keepdim=True)  # zeros, connected to the input
    up, up_bias = ("gate_up_proj", "gate_up_proj_bias") if experts.has_gate else ("up_proj", "up_proj_bias")
    bias = getattr(experts, up_bias) if experts.has_bias else None
    hidden = _grouped_linear(x_ND, getattr(experts, up), order, bias, transposed=experts.is_transposed)
    hidden = _activate(experts, hidden)
    bias = experts.down_proj_bias if experts.has_bias else None
    out_ND = _grouped_linear(hidden, experts.down_proj, order, bias, transposed=experts.is_transposed)
    if getattr(experts, "has_post_expert_norm", False):
        out_ND = experts.post_expert_norm(out_ND)
    return out_ND[:num_rows]


def routed_experts(
    experts: nn.Module, x_TD: Tensor, local_index_TK: Tensor, weight_TK: Tensor, *, num_rows: int | None = None
) -> Tensor:
    """Weighted sum of each token's expert outputs, over the slots whose expert is on this rank: ``[T, D]``.

    Args:
        x_TD, weight_TK: local, in the model's dtypes; gradients reach both.
        local_index_TK: int64; ``experts.num_experts`` or more means the slot's expert is elsewhere.
        num_rows: the number of slots that are here, if the host knows it; otherwise all.
    """
    order = kept_once(lambda: sort_by_expert(local_index_TK, num_experts=experts.num_experts, num_rows=num_rows))
    activation = fused_activation(experts)
    if activation is not None:
        names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
        biases = None
        if experts.has_bias:
            up_bias, down_bias = (getattr(experts, f"{name}_bias") for name in names)
            biases = Biases(up_eH=up_bias, down_eD=down_bias, expert_N=order.expert_N)
        return gated_experts(
            x_TD,
            weight_TK,
            *(getattr(experts, name) for name in names),
            rows=order.rows,
            ends_e=order.ends_e,
            transposed=experts.is_transposed,
            activation=activation,
            biases=biases,
        )
    y_ND = expert_mlp(experts, take_rows(x_TD, order.rows), order)
    return sum_rows(y_ND, order.rows, weight_TJ=weight_TK).to(x_TD.dtype)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``routed_experts`` under the signature of Transformers' ``ALL_EXPERTS_FUNCTIONS``.

    While ``torch.compile`` traces, Transformers' own function computes: it is made for tracing, and torch 2.11 traces
    the backward pass of this one wrongly.

    Under a dispatcher of Transformers, slots of other ranks carry the id ``num_experts``: they are counted out here,
    which costs one host sync. The dispatcher of this package knows the count and does not come through here.
    """
    if torch.compiler.is_compiling():
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    num_rows = None
    if self._is_expert_parallel:
        num_rows = int((top_k_index < self.num_experts).sum())
    return routed_experts(self, hidden_states, top_k_index, top_k_weights, num_rows=num_rows)
