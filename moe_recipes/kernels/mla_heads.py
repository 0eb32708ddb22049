"""Queries and keys of DeepSeek's latent attention from its projections, in one pass each way.

    query  [T, H, N + R]   as projected; the last R channels of a head are turned
    key    [T, H, N + R]   N channels of the head from its projection, then one turned part that all heads share
    turned (x0, x1), (x2, x3) ... are pairs; pair i turns by angle i. Laid out as all firsts, then all seconds,
           as Transformers does it for DeepSeek-V3 (``rope_interleave``)

Transformers cuts, turns and joins tensors of T x H x 192 channels about ten times forward and more often backward.

Dimensions: T tokens, H heads, N channels without and R with rotation, V channels of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def mla_heads_reference(
    query_THC: Tensor, key_value_THX: Tensor, shared_TR: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, nope: int
) -> tuple[Tensor, Tensor]:
    """As ``mla_heads``, one torch operation after the other."""
    half = shared_TR.shape[-1] // 2
    cos, sin = cos_TR[:, None, :half], sin_TR[:, None, :half]
    query = torch.cat([query_THC[..., :nope], _turned(query_THC[..., nope:], cos, sin)], dim=-1)
    shared = _turned(shared_TR[:, None], cos, sin).expand(-1, query.shape[1], -1)
    return query, torch.cat([key_value_THX[..., :nope], shared], dim=-1)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    query, key_value, shared, cos, sin, query_out, key_out, query_token, kv_token, shared_token,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
    HEADS: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column, pair = tl.arange(0, NOPE)[None, :], tl.arange(0, HALF)[None, :]
    plain, turned = (head < H) & (column < N), (head < H) & (pair < R // 2)
    q = query + token * query_token + head * (N + R)
    out = (token * H + head) * (N + R)
    tl.store(query_out + out + column, tl.load(q + column, mask=plain), mask=plain)
    of_key = tl.load(key_value + token * kv_token + head * X + column, mask=plain)
    tl.store(key_out + out + column, of_key, mask=plain)
    c = tl.load(cos + token * R + pair, mask=pair < R // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + token * R + pair, mask=pair < R // 2, other=0.0).to(tl.float32)
    first = tl.load(q + N + 2 * pair, mask=turned, other=0.0).to(tl.float32)
    second = tl.load(q + N + 2 * pair + 1, mask=turned, other=0.0).to(tl.float32)
    kind = query_out.dtype.element_ty
    tl.store(query_out + out + N + pair, (first * c - second * s).to(kind), mask=turned)
    tl.store(query_out + out + N + R // 2 + pair, (second * c + first * s).to(kind), mask=turned)
    k = shared + token * shared_token + 2 * pair
    first = tl.load(k, mask=pair < R // 2, other=0.0).to(tl.float32)
    second = tl.load(k + 1, mask=pair < R // 2, other=0.0).to(tl.float32)
    both = tl.zeros([HEADS, HALF], dtype=tl.float32)
    tl.store(key_out + out + N + pair, (both + (first * c - second * s)).to(kind), mask=turned)
    tl.store(key_out + out + N + R // 2 + pair, (both + (second * c + first * s)).to(kind), mask=turned)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_query, grad_key, grad_value, cos, sin, query_out, kv_out, shared_out,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column, pair, value = tl.arange(0, NOPE)[None, :], tl.arange(0, HALF)[None, :], tl.arange(0, WIDE)[None, :]
    c = tl.load(cos + token * R + pair, mask=pair < R // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + token * R + pair, mask=pair < R // 2, other=0.0).to(tl.float32)
    kind = query_out.dtype.element_ty
    sum_first, sum_second = tl.zeros([HEADS, HALF], dtype=tl.float32), tl.zeros([HEADS, HALF], dtype=tl.float32)
    for block in range(0, BLOCKS):
        head = (block * HEADS + tl.arange(0, HEADS))[:, None]
        plain, turned, wide = (head < H) & (column < N), (head < H) & (pair < R // 2), (head < H) & (value < V)
        at, kv = (token * H + head) * (N + R), (token * H + head) * (N + V)
        tl.store(query_out + at + column, tl.load(grad_query + at + column, mask=plain), mask=plain)
        tl.store(kv_out + kv + column, tl.load(grad_key + at + column, mask=plain), mask=plain)
        of_value = tl.load(grad_value + (token * H + head) * V + value, mask=wide)
        tl.store(kv_out + kv + N + value, of_value, mask=wide)
        up = tl.load(grad_query + at + N + pair, mask=turned, other=0.0).to(tl.float32)
        down = tl.load(grad_query + at + N + R // 2 + pair, mask=turned, other=0.0).to(tl.float32)
        tl.store(query_out + at + N + 2 * pair, (up * c + down * s).to(kind), mask=turned)
        tl.store(query_out + at + N + 2 * pair + 1, (down * c - up * s).to(kind), mask=turned)
        sum_first += tl.load(grad_key + at + N + pair, mask=turned, other=0.0).to(tl.float32)
        sum_second += tl.load(grad_key + at + N + R // 2 + pair, mask=turned, other=0.0).to(tl.float32)
    up, down = tl.sum(sum_first, axis=0, keep_dims=True), tl.sum(sum_second, axis=0, keep_dims=True)
    tl.store(shared_out + token * R + 2 * pair, (up * c + down * s).to(kind), mask=pair < R // 2)
    tl.store(shared_out + token * R + 2 * pair + 1, (down * c - up * s).to(kind), mask=pair < R // 2)


HEADS_AT_ONCE = 16


class _MlaHeads(torch.autograd.Function):
    """Keeps the angles alone."""

    @staticmethod
    def forward(
        ctx: Any, query_THC: Tensor, key_value_THX: Tensor, shared_TR: Tensor, cos_TR: Tensor, sin_TR: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(True)
        tokens, heads, width = query_THC.shape
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.sizes = tokens, heads, nope, width - nope, key_value_THX.shape[2] - nope
        query, key = (torch.empty_like(query_THC, memory_format=torch.contiguous_format) for _ in range(2))
        at_once = min(HEADS_AT_ONCE, power_of_two(heads))
        _forward_kernel[(tokens, -(-heads // at_once))](
            query_THC, key_value_THX, shared_TR, cos_TR, sin_TR, query, key,
            query_THC.stride(0), key_value_THX.stride(0), shared_TR.stride(0),
            H=heads, N=nope, R=width - nope, X=key_value_THX.shape[2],
            HEADS=at_once, NOPE=power_of_two(nope), HALF=power_of_two((width - nope) // 2),
        )  # fmt: skip
        return query, key, key_value_THX[..., nope:].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TR, sin_TR = ctx.saved_tensors
        tokens, heads, nope, rope, wide = ctx.sizes
        grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
        query = torch.empty_like(grad_query)
        key_value = grad_query.new_empty(tokens, heads, nope + wide)
        shared = grad_query.new_empty(tokens, rope)
        at_once = min(HEADS_AT_ONCE, power_of_two(heads))
        _backward_kernel[(tokens,)](
            grad_query, grad_key, grad_value, cos_TR, sin_TR, query, key_value, shared,
            H=heads, N=nope, R=rope, V=wide, HEADS=at_once, BLOCKS=-(-heads // at_once),
            NOPE=power_of_two(nope), HALF=power_of_two(rope // 2), WIDE=power_of_two(wide),
        )  # fmt: skip
        return query, key_value, shared, None, None, None


def mla_heads(
    query_THC: Tensor, key_value_THX: Tensor, shared_TR: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, nope: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that attention takes: ``[T, H, N + R]`` twice, ``[T, H, V]``.

    Args:
        query_THC: C = N + R. ``key_value_THX``: X = N + V. Heads and channels lie side by side in both.
        shared_TR: the part of the keys that all heads share.
        cos_TR, sin_TR: as Transformers' rotary embedding has them: the first R / 2 of each row count.
        nope: N.
    """
    if not use_triton(query_THC) or query_THC.numel() == 0:
        angles = (cos_TR, sin_TR)
        query, key = mla_heads_reference(query_THC, key_value_THX, shared_TR, *angles, nope=nope)
        return query, key, key_value_THX[..., nope:]
    return _MlaHeads.apply(query_THC, key_value_THX, shared_TR, cos_TR.contiguous(), sin_TR.contiguous(), nope)
