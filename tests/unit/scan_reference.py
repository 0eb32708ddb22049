"""Mamba-2 written token by token from its recurrence, in float64: what the chunked scan and its convolution must give.

h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T,   h = 0 before the first token of a document
y_t = h_t C_t + D x_t,   dt_t = clip(softplus(raw_t + bias))
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def slow_scan(inputs: list[Tensor], limit: tuple[float, float], document_BS: Tensor) -> Tensor:
    """``inputs``: x [B, S, H, P], raw dt [B, S, H], A [H], B and C [B, S, G, N], D [H], dt bias [H]."""
    x, raw, A, B, C, D, bias = inputs
    heads_per_group = x.shape[2] // B.shape[2]
    outs, state = [], x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3])
    for t in range(x.shape[1]):
        if t:
            state = state * (document_BS[:, t] == document_BS[:, t - 1])[:, None, None, None]
        dt = F.softplus(raw[:, t] + bias).clamp(*limit)
        B_t, C_t = (each[:, t].repeat_interleave(heads_per_group, dim=1) for each in (B, C))
        state = state * torch.exp(dt * A)[..., None, None] + (dt[..., None] * x[:, t])[..., None] * B_t[:, :, None]
        outs.append((state * C_t[:, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outs, dim=1)


def slow_conv(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, document_BS: Tensor) -> Tensor:
    """Each token's filter over itself and the tokens before it in its document, then SiLU."""
    width, outs = weight_CK.shape[1], []
    for t in range(x_BSC.shape[1]):
        out = bias_C.expand_as(x_BSC[:, t])
        for back in range(min(width, t + 1)):
            same = (document_BS[:, t] == document_BS[:, t - back])[:, None]
            out = out + same * x_BSC[:, t - back] * weight_CK[:, width - 1 - back]
        outs.append(F.silu(out))
    return torch.stack(outs, dim=1)


def slow_gated_norm(y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, *, groups: int, eps: float) -> Tensor:
    """RMSNorm over each group of channels of ``y * silu(gate)``."""
    gated = (y_BSD * F.silu(gate_BSD)).unflatten(-1, (groups, -1))
    return weight_D * (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)).flatten(-2)


def documents(lengths: list[list[int]]) -> Tensor:
    """``[B, S]``: the number of each token's document in its row."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
