"""The expert block of the families that this package knows, as one autograd function: ``silu(gate) * up``, ``relu2``,
and GPT-OSS's clamped gate with biases.

What costs a matrix product is kept, what is elementwise or a gather is made again in the backward pass:

    kept       rows as they came [R, D], first product of each routed row [N, 2F] or, without a gate, [N, F], weights,
               the order (integers)
    rebuilt    rows in expert order, activation, and nothing else: the experts' output is not needed again, since the
               gradient of a routing weight is <activation, gradient before down_proj>

Per routed row of Qwen3-30B-A3B this is 3 KB instead of the 10 KB that autograd would keep of the same operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_recipes.kernels.clamped_swiglu import ClampedSwiglu, clamped_swiglu, weighted_clamped_swiglu_backward
from moe_recipes.kernels.relu2 import relu2, weighted_relu2_backward
from moe_recipes.kernels.rows import RowMap, gather_rows, weighted_row_sum
from moe_recipes.kernels.swiglu import swiglu, weighted_swiglu_backward


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What stands between the two products. With biases both functions take ``bias_eH`` and ``expert_N`` too."""

    forward: Callable[..., Tensor]
    """First product ``[N, H]`` to ``[N, F]``."""

    weighted_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """As ``kernels.swiglu.weighted_swiglu_backward``."""


SWIGLU = Activation(forward=swiglu, weighted_backward=weighted_swiglu_backward)
RELU2 = Activation(forward=relu2, weighted_backward=weighted_relu2_backward)


def clamped(*, alpha: float, limit: float) -> Activation:
    """GPT-OSS's. Its experts have biases."""
    numbers = ClampedSwiglu(alpha=alpha, limit=limit)
    return Activation(
        forward=partial(clamped_swiglu, numbers=numbers),
        weighted_backward=partial(weighted_clamped_swiglu_backward, numbers=numbers),
    )


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Of each local expert, and whose row each routed row is."""

    up_eH: Tensor
    down_eD: Tensor
    expert_N: Tensor


class _GatedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias_eH: Tensor | None,
        down_bias_eD: Tensor | None,
        layout: tuple[RowMap, Tensor, Tensor | None, bool, Activation],
    ) -> Tensor:
        ctx.layout = rows, ends_e, expert_N, transposed, activation = layout
        hidden_NH = _linear(gather_rows(x_RD, rows).to(up.dtype), up, ends_e, transposed=transposed)
        ctx.save_for_backward(x_RD, weight_RK, up, down, up_bias_eH, down_bias_eD, hidden_NH)
        act_NF = activation.forward(hidden_NH, *_given(up_bias_eH, expert_N))
        out_RD = weighted_row_sum(_linear(act_NF, down, ends_e, transposed=transposed), rows, weight_RK).to(x_RD.dtype)
        if down_bias_eD is None:
            return out_RD
        return out_RD.addmm_(_expert_weights(weight_RK, rows, expert_N, down_bias_eD).to(out_RD.dtype), down_bias_eD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_RK, up, down, up_bias_eH, down_bias_eD, hidden_NH = ctx.saved_tensors
        rows, ends_e, expert_N, transposed, activation = ctx.layout
        need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = ctx.needs_input_grad[:6]
        grad_y_ND = gather_rows(grad_RD, rows).to(down.dtype)  # before the routing weights
        grad_act_NF = _linear(grad_y_ND, down, ends_e, transposed=not transposed)
        act_NF, grad_hidden_NH, grad_weight = activation.weighted_backward(
            grad_act_NF, hidden_NH, weight_RK, rows.slot_N, *_given(up_bias_eH, expert_N)
        )
        grad_down = _weight_gradient(act_NF, grad_y_ND, down, ends_e, transposed=transposed) if need_down else None
        grad_up = grad_x = grad_up_bias = grad_down_bias = None
        if need_up:
            x_ND = gather_rows(x_RD, rows).to(up.dtype)
            grad_up = _weight_gradient(x_ND, grad_hidden_NH, up, ends_e, transposed=transposed)
        if need_x:
            grad_x_ND = _linear(grad_hidden_NH, up, ends_e, transposed=not transposed)
            grad_x = weighted_row_sum(grad_x_ND, rows, None).to(x_RD.dtype)
        if up_bias_eH is not None and need_up_bias:
            grad_up_bias = _sum_by_expert(grad_hidden_NH, ends_e).to(up_bias_eH.dtype)
        if down_bias_eD is not None:
            grad = grad_RD.to(down_bias_eD.dtype)
            if need_down_bias:
                grad_down_bias = _expert_weights(weight_RK, rows, expert_N, down_bias_eD).T @ grad
            of_bias_Re = grad @ down_bias_eD.T
            here = of_bias_Re[rows.token_N, expert_N.long()]
            grad_weight.view(-1)[rows.slot_N] += here.to(grad_weight.dtype)
        return grad_x, grad_weight if need_weight else None, grad_up, grad_down, grad_up_bias, grad_down_bias, None


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _expert_weights(weight_RK: Tensor, rows: RowMap, expert_N: Tensor, bias_eD: Tensor) -> Tensor:
    """Routing weights by expert, so that biases are added up in one small product: ``[R, e]`` in the bias's dtype."""
    weight_Re = bias_eD.new_zeros(len(weight_RK), len(bias_eD))
    weight_Re[rows.token_N, expert_N.long()] = weight_RK.reshape(-1)[rows.slot_N].to(weight_Re.dtype)
    return weight_Re


def _sum_by_expert(x_NH: Tensor, ends_e: Tensor) -> Tensor:
    """Sum of each expert's rows: ``[e, H]``. A product with ones, which adds up in float32 and reads the rows once."""
    if len(x_NH) == 0:
        return x_NH.new_zeros(len(ends_e), x_NH.shape[1])
    ones_N8 = x_NH.new_ones(len(x_NH), 8)  # as few columns as the product's alignment allows
    return F.grouped_mm(ones_N8.T, x_NH, offs=ends_e)[:, 0]


def _linear(x_NI: Tensor, weight: Tensor, ends_e: Tensor, *, transposed: bool) -> Tensor:
    """Row n times its own expert's weight, ``[e, O, I]`` or, transposed, ``[e, I, O]``: ``[N, O]``."""
    weight_eIO = weight if transposed else weight.transpose(-2, -1)
    if len(x_NI) == 0:
        return x_NI.new_empty(0, weight_eIO.shape[-1])
    return F.grouped_mm(x_NI, weight_eIO, offs=ends_e)


def _weight_gradient(x_NI: Tensor, grad_NO: Tensor, weight: Tensor, ends_e: Tensor, *, transposed: bool) -> Tensor:
    """Gradient of the weights of ``_linear``, laid out as they are; zero for an expert without a row."""
    if len(x_NI) == 0:
        return torch.zeros_like(weight)
    left, right = (x_NI, grad_NO) if transposed else (grad_NO, x_NI)
    return F.grouped_mm(left.T, right, offs=ends_e)


def gated_experts(
    x_RD: Tensor,
    weight_RK: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    rows: RowMap,
    ends_e: Tensor,
    transposed: bool,
    activation: Activation = SWIGLU,
    biases: Biases | None = None,
) -> Tensor:
    """Each row's weighted sum over the local experts that its slots name: ``[R, D]`` in x's dtype.

    Args:
        x_RD, weight_RK: rows and the routing weights of their slots, local.
        up: ``[e, H, D]``, or transposed ``[e, D, H]``; local. H is 2F where the activation has a gate, else F.
        down: ``[e, D, F]`` or transposed ``[e, F, D]``; local.
        rows: N routed rows in expert order over the R x K slots.
        ends_e: int32, one past the last routed row of each expert.
        biases: only with ``clamped``, and always with it.
    """
    found = (biases.up_eH, biases.down_eD, biases.expert_N) if biases is not None else (None, None, None)
    layout = rows, ends_e, found[2], transposed, activation
    return _GatedExperts.apply(x_RD, weight_RK, up, down, found[0], found[1], layout)
