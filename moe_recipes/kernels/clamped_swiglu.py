"""GPT-OSS's activation with the bias in front of it, in one pass each way.

gate, up = row[0::2] + bias[0::2], row[1::2] + bias[1::2]        side by side, not in halves
g, u = min(gate, limit), clamp(up, -limit, limit)
out = (u + 1) * g * sigmoid(alpha * g)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """The numbers of the activation."""

    alpha: float
    limit: float


def _parts(gate_up_N2F: Tensor, bias_e2F: Tensor, expert_N: Tensor, numbers: ClampedSwiglu) -> tuple[Tensor, ...]:
    """Gate and up with their bias, and both clamped, in at least float32."""
    dtype = torch.promote_types(gate_up_N2F.dtype, torch.float32)
    row = gate_up_N2F.to(dtype) + bias_e2F.to(dtype)[expert_N.long()]
    gate, up = row[:, 0::2], row[:, 1::2]
    return gate, up, gate.clamp(max=numbers.limit), up.clamp(-numbers.limit, numbers.limit)


def clamped_swiglu_reference(gate_up_N2F: Tensor, bias_e2F: Tensor, expert_N: Tensor, numbers: ClampedSwiglu) -> Tensor:
    """``[N, 2F]`` to ``[N, F]``."""
    _, _, g, u = _parts(gate_up_N2F, bias_e2F, expert_N, numbers)
    return ((u + 1) * g * torch.sigmoid(numbers.alpha * g)).to(gate_up_N2F.dtype)


@triton.jit
def _load_pairs(gate_up, bias, row, expert, column, F):  # type: ignore[no-untyped-def]
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + 2 * column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + 2 * column + 1, mask=inside, other=0.0).to(tl.float32)
    gate += tl.load(bias + expert * 2 * F + 2 * column, mask=inside, other=0.0).to(tl.float32)
    up += tl.load(bias + expert * 2 * F + 2 * column + 1, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _forward_kernel(gate_up, bias, expert_of, out, F, alpha, limit, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_of + row).to(tl.int64)
    gate, up = _load_pairs(gate_up, bias, row, expert, column, F)
    g = tl.minimum(gate, limit)
    u = tl.minimum(tl.maximum(up, -limit), limit)
    value = (u + 1) * g * tl.sigmoid(alpha * g)
    tl.store(out + row * F + column, value.to(out.dtype.element_ty), mask=column < F)


@triton.jit
def _weighted_backward_kernel(  # type: ignore[no-untyped-def]
    grad, gate_up, bias, expert_of, weight, slot, act, grad_gate_up, grad_weight, alpha, limit,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(slot + row)
    scale = tl.load(weight + place).to(tl.float32)
    expert = tl.load(expert_of + row).to(tl.int64)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        grad_act = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
        gate, up = _load_pairs(gate_up, bias, row, expert, column, F)
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        sigmoid = tl.sigmoid(alpha * g)
        glu = g * sigmoid
        dot += grad_act * (u + 1) * glu
        grad_act *= scale
        grad_gate = grad_act * (u + 1) * (sigmoid + alpha * glu * (1 - sigmoid))
        grad_gate = tl.where(gate <= limit, grad_gate, 0.0)
        grad_up = tl.where((up >= -limit) & (up <= limit), grad_act * glu, 0.0)
        here = grad_gate_up + row * 2 * F + 2 * column
        tl.store(act + row * F + column, (scale * (u + 1) * glu).to(act.dtype.element_ty), mask=inside)
        tl.store(here, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(here + 1, grad_up.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_weight + place, tl.sum(dot, axis=0).to(grad_weight.dtype.element_ty))


def weighted_clamped_swiglu_backward_reference(
    grad_NF: Tensor, gate_up_N2F: Tensor, weight_TJ: Tensor, slot_N: Tensor, bias_e2F: Tensor, expert_N: Tensor,
    numbers: ClampedSwiglu,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``weighted_clamped_swiglu_backward``, one torch operation after the other."""
    gate, up, g, u = _parts(gate_up_N2F, bias_e2F, expert_N, numbers)
    grad, scale_N1 = grad_NF.to(g.dtype), weight_TJ.reshape(-1)[slot_N].to(g.dtype).unsqueeze(1)
    sigmoid = torch.sigmoid(numbers.alpha * g)
    glu = g * sigmoid
    act_NF = (u + 1) * glu
    grad_weight = torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    grad_weight.view(-1)[slot_N] = (grad * act_NF).sum(dim=1).to(weight_TJ.dtype)
    grad = grad * scale_N1
    grad_gate = grad * (u + 1) * (sigmoid + numbers.alpha * glu * (1 - sigmoid)) * (gate <= numbers.limit)
    grad_up = grad * glu * (up.abs() <= numbers.limit)
    grad_gate_up = torch.stack([grad_gate, grad_up], dim=-1).flatten(1)
    return (scale_N1 * act_NF).to(grad_NF.dtype), grad_gate_up.to(gate_up_N2F.dtype), grad_weight


def clamped_swiglu(gate_up_N2F: Tensor, bias_e2F: Tensor, expert_N: Tensor, numbers: ClampedSwiglu) -> Tensor:
    """``[N, 2F]``, gate and up in turn and without their bias, to ``[N, F]``; no autograd on a GPU.

    Args:
        bias_e2F: of each local expert. ``expert_N``: integers, whose row it is.
    """
    if not use_triton(gate_up_N2F) or len(gate_up_N2F) == 0:
        return clamped_swiglu_reference(gate_up_N2F, bias_e2F, expert_N, numbers)
    rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    out = gate_up_N2F.new_empty(rows, width)
    block = min(1024, power_of_two(width))
    _forward_kernel[(rows, -(-width // block))](
        gate_up_N2F.contiguous(), bias_e2F.contiguous(), expert_N, out, width, numbers.alpha, numbers.limit,
        BLOCK=block,
    )  # fmt: skip
    return out


def weighted_clamped_swiglu_backward(
    grad_NF: Tensor, gate_up_N2F: Tensor, weight_TJ: Tensor, slot_N: Tensor, bias_e2F: Tensor, expert_N: Tensor,
    numbers: ClampedSwiglu,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``kernels.swiglu.weighted_swiglu_backward``, for this activation. The gradient of the bias is the sum of
    ``grad_gate_up`` over an expert's rows."""
    if not use_triton(grad_NF) or len(grad_NF) == 0:
        return weighted_clamped_swiglu_backward_reference(
            grad_NF, gate_up_N2F, weight_TJ, slot_N, bias_e2F, expert_N, numbers
        )
    rows, width = grad_NF.shape
    act, grad_gate_up = torch.empty_like(grad_NF), torch.empty_like(gate_up_N2F)
    grad_weight = torch.zeros_like(weight_TJ, memory_format=torch.contiguous_format)
    _weighted_backward_kernel[(rows,)](
        grad_NF.contiguous(), gate_up_N2F, bias_e2F.contiguous(), expert_N, weight_TJ.contiguous(), slot_N, act,
        grad_gate_up, grad_weight, numbers.alpha, numbers.limit, width, BLOCK=min(1024, power_of_two(width)),
    )  # fmt: skip
    return act, grad_gate_up, grad_weight
