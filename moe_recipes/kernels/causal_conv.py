"""The short convolution in front of a state-space scan, with its SiLU: causal, one filter a channel, no look over a
document's border.

Plain torch, for the CPU and for GPUs without causal-conv1d. It works through blocks of tokens in float32, so that what
it needs beside its input and output fits a cache, and makes the convolution again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_recipes.kernels.documents import Run

BLOCK = 256
"""Tokens a block."""


def _filtered(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, *, skip: int) -> Tensor:
    """The convolution of float32 tokens, without the first ``skip``, which only give context: ``[B, T - skip, C]``."""
    width, length = weight_CK.shape[1], x_BTC.shape[1]
    out = x_BTC[:, skip:] * weight_CK[:, -1]
    for back in range(1, min(width, length)):
        first = max(skip, back)  # the first token that has one so far back
        out[:, first - skip :].addcmul_(x_BTC[:, first - back : length - back], weight_CK[:, width - 1 - back])
    return out if bias_C is None else out.add_(bias_C)


def _blocks(runs: Sequence[Run]) -> Sequence[tuple[Run, int, int]]:
    return [(run, start, min(start + BLOCK, run.end)) for run in runs for start in range(run.start, run.end, BLOCK)]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, runs: Sequence[Run]) -> Tensor:
        ctx.save_for_backward(x_BSC, weight_CK, bias_C)
        ctx.runs = runs
        weight, bias = weight_CK.float(), None if bias_C is None else bias_C.float()
        out = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
        for run, start, end in _blocks(runs):
            first = max(run.start, start - weight.shape[1] + 1)
            block = _filtered(x_BSC[run.rows, first:end].float(), weight, bias, skip=start - first)
            out[run.rows, start:end] = F.silu(block, inplace=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSC: Tensor) -> tuple[Tensor | None, ...]:
        x_BSC, weight_CK, bias_C = ctx.saved_tensors
        weight, bias = weight_CK.float(), None if bias_C is None else bias_C.float()
        width = weight.shape[1]
        grad_x = torch.empty(x_BSC.shape, dtype=x_BSC.dtype, device=x_BSC.device)
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for run, start, end in _blocks(ctx.runs):
            # A token's gradient comes from itself and the next width - 1 tokens; those need as many before them.
            first, beyond = max(run.start, start - width + 1), min(run.end, end + width - 1)
            x = x_BSC[run.rows, first:beyond].float()
            filtered = _filtered(x, weight, bias, skip=start - first)
            grad = torch.ops.aten.silu_backward(grad_BSC[run.rows, start:beyond].float(), filtered)
            here, x, offset = grad[:, : end - start], x[:, : end - first], start - first
            grad_block = here * weight[:, -1]
            grad_weight[:, -1] += (here * x[:, offset:]).sum((0, 1))
            for back in range(1, width):
                later = grad[:, back : back + end - start]
                grad_block[:, : later.shape[1]].addcmul_(later, weight[:, width - 1 - back])
                lead = max(0, back - offset)  # tokens of the block that have none so far back
                if lead < end - start:
                    earlier = x[:, offset + lead - back : x.shape[1] - back]
                    grad_weight[:, width - 1 - back] += (here[:, lead:] * earlier).sum((0, 1))
            grad_x[run.rows, start:end] = grad_block
            if grad_bias is not None:
                grad_bias += here.sum((0, 1))
        bias_dtype = None if bias_C is None else bias_C.dtype
        return grad_x, grad_weight.to(weight_CK.dtype), None if grad_bias is None else grad_bias.to(bias_dtype), None


def causal_conv_silu(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, runs: Sequence[Run]) -> Tensor:
    """``silu(bias + sum_k weight[:, K - 1 - k] * x[t - k])`` over the tokens of t's own document: ``[B, S, C]``.

    Args:
        runs: the documents; together they hold every token once.
    """
    return _CausalConv.apply(x_BSC, weight_CK, bias_C, runs)
