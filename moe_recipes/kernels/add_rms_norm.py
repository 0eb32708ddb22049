"""The residual sum and the RMSNorm after it in one pass each way; the sum is read once less in both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_recipes.kernels.rms_norm import launch_backward, launch_forward, rms_norm_reference
from moe_recipes.kernels.triton import use_triton


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x`` in their dtype, as in Transformers, and its norm: ``(normed, sum)``."""
    total = residual + x
    return rms_norm_reference(total, weight_D, eps), total


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, residual_RD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, total, scale = launch_forward(x_RD, residual_RD, weight_D, eps)
        ctx.save_for_backward(total, weight_D, scale)
        return out, total

    @staticmethod
    def backward(
        ctx: Any, grad_RD: Tensor | None, grad_total_RD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad_RD is None:
            return grad_total_RD, grad_total_RD, None, None
        grad_x, grad_weight = launch_backward(grad_RD, grad_total_RD, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, None


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(norm(residual + x), residual + x)`` over the last dimension; x and residual have one shape.

    Keeps the sum, which the next residual needs anyway, and one float32 a row. Both inputs get one gradient, the sum
    of both outputs', rounded once; the weight's adds up in float32 in a fixed order. CPU tensors and mixed dtypes go
    through the reference.
    """
    fits = x.dtype == residual.dtype == weight_D.dtype and x.shape == residual.shape and x.numel() > 0
    if not fits or not use_triton(x):
        return add_rms_norm_reference(x, residual, weight_D, eps)
    # The kernel counts on rows side by side; a slice of a wider tensor is not.
    rows = [t.reshape(-1, x.shape[-1]).contiguous() for t in (x, residual)]
    normed, total = _AddRMSNorm.apply(*rows, weight_D, eps)
    return normed.view(x.shape), total.view(x.shape)
