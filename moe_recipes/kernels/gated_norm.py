"""RMSNorm over groups of channels of ``y * silu(gate)``, as Mamba-2 has it before its output projection.

Plain torch, through blocks of tokens in float32, made again in the backward pass: beside its inputs and output it holds
one block, where the same lines on whole tensors keep six float32 tensors of the layer's inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 256
"""Tokens a block."""


def _norm(y: Tensor, gate: Tensor, weight_D: Tensor, group_size: int, eps: float) -> Tensor:
    gated = (y.float() * F.silu(gate.float())).unflatten(-1, (-1, group_size))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return weight_D.float() * normed.flatten(-2)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, group_size: int, eps: float) -> Tensor:
        ctx.save_for_backward(y_BSD, gate_BSD, weight_D)
        ctx.options = group_size, eps
        out = torch.empty(y_BSD.shape, dtype=y_BSD.dtype, device=y_BSD.device)
        for start in range(0, y_BSD.shape[1], BLOCK):
            at = slice(None), slice(start, start + BLOCK)
            out[at] = _norm(y_BSD[at], gate_BSD[at], weight_D, group_size, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        y_BSD, gate_BSD, weight_D = ctx.saved_tensors
        grad_y, grad_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y_BSD, gate_BSD))
        grad_weight = torch.zeros(weight_D.shape, dtype=torch.float32, device=weight_D.device)
        weight = weight_D.detach().float().requires_grad_()
        for start in range(0, y_BSD.shape[1], BLOCK):
            at = slice(None), slice(start, start + BLOCK)
            with torch.enable_grad():
                inputs = [t[at].detach().float().requires_grad_() for t in (y_BSD, gate_BSD)]
                out = _norm(*inputs, weight, *ctx.options)
            grad_y[at], grad_gate[at], part = torch.autograd.grad(out, [*inputs, weight], grad_BSD[at].float())
            grad_weight += part
        return grad_y, grad_gate, grad_weight.to(weight_D.dtype), None, None


def gated_group_norm(y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, *, group_size: int, eps: float) -> Tensor:
    """``weight * rms_norm(y * silu(gate))``, the mean over each ``group_size`` channels: ``[B, S, D]`` in y's dtype."""
    return _GatedNorm.apply(y_BSD, gate_BSD, weight_D, group_size, eps)
