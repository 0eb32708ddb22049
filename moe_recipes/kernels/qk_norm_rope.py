"""RMSNorm of every query and key head and their rotary embedding, for q and k together in one pass each way.

Eager Transformers makes about twenty passes over q and k here. The kernel reads what the projections wrote, where it
lies, and writes ``[B, S, H, D]``, so that ``transpose(1, 2)`` hands attention its layout without a copy.

Shape letters: B batch, S sequence, H heads, D head dim, P heads * head dim, R rotary dims (the first R of D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_recipes.kernels.rms_norm import MAX_PROGRAMS, rms_norm_reference
from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton

TILE_ELEMENTS = 4096
"""A program works on the heads of one token; this many elements at a time."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _rotated(x_BSP: Tensor, weight_D: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, eps: float) -> Tensor:
    x = x_BSP.unflatten(-1, (-1, head_dim))
    if weight_D is not None:
        x = rms_norm_reference(x, weight_D, eps)
    turning, rest = x.split((cos.shape[-1], head_dim - cos.shape[-1]), dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def qk_norm_rope_reference(
    q_BSP: Tensor,
    k_BSP: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Transformers' ``q_norm``, ``k_norm`` and ``apply_rotary_pos_emb`` (rotate-half), with its roundings.

    Args: those of ``qk_norm_rope``.
    """
    q = _rotated(q_BSP, q_weight_D, cos, sin, head_dim, eps)
    return q, _rotated(k_BSP, k_weight_D, cos, sin, head_dim, eps)


@triton.jit
def _load(x, offset, inside, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows at ``offset`` as three tiles: the two halves that turn into each other, and what does not turn."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside & (column < HALF)
    first = tl.load(x + offset + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + offset + HALF + column, mask=mask, other=0.0).to(tl.float32)
    column = tl.arange(0, REST_BLOCK)[None, :]
    rest = tl.load(x + offset + 2 * HALF + column, mask=inside & (column < REST), other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    x, offset, inside, first, second, rest,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside & (column < HALF)
    tl.store(x + offset + column, first.to(x.dtype.element_ty), mask=mask)
    tl.store(x + offset + HALF + column, second.to(x.dtype.element_ty), mask=mask)
    column = tl.arange(0, REST_BLOCK)[None, :]
    tl.store(x + offset + 2 * HALF + column, rest.to(x.dtype.element_ty), mask=inside & (column < REST))


@triton.jit
def _inverse_rms(first, second, rest, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    squares = tl.sum(first * first, axis=1, keep_dims=True) + tl.sum(second * second, axis=1, keep_dims=True)
    return tl.rsqrt((squares + tl.sum(rest * rest, axis=1, keep_dims=True)) / D + eps)


@triton.jit
def _rounded(value, like):  # type: ignore[no-untyped-def]
    """As if stored in ``like``'s dtype in between, which Transformers does after every step."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward_heads(  # type: ignore[no-untyped-def]
    x, weight, out, x_offset, out_offset, cos1, cos2, sin1, sin2, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    always = tl.arange(0, 1)[:, None] == 0
    for start in range(0, HEADS, TILE):
        head = start + tl.arange(0, TILE)[:, None]
        inside = head < HEADS
        y1, y2, y3 = _load(x, x_offset + head * D, inside, HALF, REST, BLOCK, REST_BLOCK)
        if NORM:
            w1, w2, w3 = _load(weight, 0, always, HALF, REST, BLOCK, REST_BLOCK)
            inverse = _inverse_rms(y1, y2, y3, eps, D)
            y1 = _rounded(w1 * _rounded(y1 * inverse, out), out)
            y2 = _rounded(w2 * _rounded(y2 * inverse, out), out)
            y3 = w3 * _rounded(y3 * inverse, out)
        z1 = _rounded(y1 * cos1, out) - _rounded(y2 * sin1, out)
        z2 = _rounded(y2 * cos2, out) + _rounded(y1 * sin2, out)
        _store(out, out_offset + head * D, inside, z1, z2, y3, HALF, REST, BLOCK, REST_BLOCK)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_weight, k_weight, q_out, k_out,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, rope_stride_b, rope_stride_s, S, eps,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    always = tl.arange(0, 1)[:, None] == 0
    rope = b * rope_stride_b + s * rope_stride_s
    cos1, cos2, _ = _load(cos, rope, always, HALF, 0, BLOCK, 1)
    sin1, sin2, _ = _load(sin, rope, always, HALF, 0, BLOCK, 1)
    _forward_heads(
        q, q_weight, q_out, b * q_stride_b + s * q_stride_s, token * Q_HEADS * D, cos1, cos2, sin1, sin2, eps,
        Q_NORM, Q_HEADS, Q_TILE, D, HALF, REST, BLOCK, REST_BLOCK,
    )  # fmt: skip
    _forward_heads(
        k, k_weight, k_out, b * k_stride_b + s * k_stride_s, token * K_HEADS * D, cos1, cos2, sin1, sin2, eps,
        K_NORM, K_HEADS, K_TILE, D, HALF, REST, BLOCK, REST_BLOCK,
    )  # fmt: skip


@triton.jit
def _backward_heads(  # type: ignore[no-untyped-def]
    grad, x, weight, grad_x, grad_offset, grad_stride_h, x_offset, out_offset, present, cos1, cos2, sin1, sin2,
    total1, total2, total3, eps, NORM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one token's heads; hands back the running sums of the weight's, ``[TILE, ...]`` each."""
    always = tl.arange(0, 1)[:, None] == 0
    for start in range(0, HEADS, TILE):
        head = start + tl.arange(0, TILE)[:, None]
        inside = (head < HEADS) & present
        d1, d2, g3 = _load(grad, grad_offset + head * grad_stride_h, inside, HALF, REST, BLOCK, REST_BLOCK)
        g1 = d1 * cos1 + d2 * sin2
        g2 = d2 * cos2 - d1 * sin1
        if NORM:
            w1, w2, w3 = _load(weight, 0, always, HALF, REST, BLOCK, REST_BLOCK)
            x1, x2, x3 = _load(x, x_offset + head * D, inside, HALF, REST, BLOCK, REST_BLOCK)
            inverse = _inverse_rms(x1, x2, x3, eps, D)
            n1, n2, n3 = x1 * inverse, x2 * inverse, x3 * inverse
            total1 += g1 * _rounded(n1, grad_x)
            total2 += g2 * _rounded(n2, grad_x)
            total3 += g3 * _rounded(n3, grad_x)
            g1, g2, g3 = g1 * w1, g2 * w2, g3 * w3
            dot = tl.sum(g1 * n1, axis=1, keep_dims=True) + tl.sum(g2 * n2, axis=1, keep_dims=True)
            mean = (dot + tl.sum(g3 * n3, axis=1, keep_dims=True)) / D
            g1, g2, g3 = inverse * (g1 - n1 * mean), inverse * (g2 - n2 * mean), inverse * (g3 - n3 * mean)
        _store(grad_x, out_offset + head * D, inside, g1, g2, g3, HALF, REST, BLOCK, REST_BLOCK)
    return total1, total2, total3


@triton.jit
def _store_sums(  # type: ignore[no-untyped-def]
    partial, offset, total1, total2, total3,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    sum1, sum2 = tl.sum(total1, axis=0, keep_dims=True), tl.sum(total2, axis=0, keep_dims=True)
    sum3 = tl.sum(total3, axis=0, keep_dims=True)
    _store(partial, offset, tl.arange(0, 1)[:, None] == 0, sum1, sum2, sum3, HALF, REST, BLOCK, REST_BLOCK)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    q_grad, k_grad, q, k, cos, sin, q_weight, k_weight, q_out, k_out, partial,
    q_grad_stride_b, q_grad_stride_s, q_grad_stride_h, k_grad_stride_b, k_grad_stride_s, k_grad_stride_h,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, rope_stride_b, rope_stride_s, S, tokens, eps,
    TOKENS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    q1, q2 = tl.zeros([Q_TILE, BLOCK], dtype=tl.float32), tl.zeros([Q_TILE, BLOCK], dtype=tl.float32)
    k1, k2 = tl.zeros([K_TILE, BLOCK], dtype=tl.float32), tl.zeros([K_TILE, BLOCK], dtype=tl.float32)
    q3, k3 = tl.zeros([Q_TILE, REST_BLOCK], dtype=tl.float32), tl.zeros([K_TILE, REST_BLOCK], dtype=tl.float32)
    for index in range(0, TOKENS):
        token = program * TOKENS + index
        present = (tl.arange(0, 1)[:, None] + token) < tokens
        b, s = token // S, token % S
        rope = b * rope_stride_b + s * rope_stride_s
        cos1, cos2, _ = _load(cos, rope, present, HALF, 0, BLOCK, 1)
        sin1, sin2, _ = _load(sin, rope, present, HALF, 0, BLOCK, 1)
        q1, q2, q3 = _backward_heads(
            q_grad, q, q_weight, q_out, b * q_grad_stride_b + s * q_grad_stride_s, q_grad_stride_h,
            b * q_stride_b + s * q_stride_s, token * Q_HEADS * D, present, cos1, cos2, sin1, sin2, q1, q2, q3, eps,
            Q_NORM, Q_HEADS, Q_TILE, D, HALF, REST, BLOCK, REST_BLOCK,
        )  # fmt: skip
        k1, k2, k3 = _backward_heads(
            k_grad, k, k_weight, k_out, b * k_grad_stride_b + s * k_grad_stride_s, k_grad_stride_h,
            b * k_stride_b + s * k_stride_s, token * K_HEADS * D, present, cos1, cos2, sin1, sin2, k1, k2, k3, eps,
            K_NORM, K_HEADS, K_TILE, D, HALF, REST, BLOCK, REST_BLOCK,
        )  # fmt: skip
    if Q_NORM:
        _store_sums(partial, program * 2 * D, q1, q2, q3, HALF, REST, BLOCK, REST_BLOCK)
    if K_NORM:
        _store_sums(partial, program * 2 * D + D, k1, k2, k3, HALF, REST, BLOCK, REST_BLOCK)


def _shape(q: Tensor, k: Tensor, rotary: int, head_dim: int, norms: tuple[bool, bool]) -> dict[str, Any]:
    """The kernels' compile-time arguments."""
    half, rest = rotary // 2, head_dim - rotary
    block, rest_block = power_of_two(half), power_of_two(rest)
    most = max(1, TILE_ELEMENTS // (2 * block + rest_block))
    # Rounded down to a power of two.
    most = power_of_two(most + 1) // 2
    heads = (q.shape[-1] // head_dim, k.shape[-1] // head_dim)
    return {
        "Q_NORM": norms[0], "K_NORM": norms[1], "Q_HEADS": heads[0], "K_HEADS": heads[1],
        "Q_TILE": min(most, power_of_two(heads[0])), "K_TILE": min(most, power_of_two(heads[1])),
        "D": head_dim, "HALF": half, "REST": rest, "BLOCK": block, "REST_BLOCK": rest_block,
    }  # fmt: skip


class _QKNormRope(torch.autograd.Function):
    """Keeps what the projections wrote, and nothing of the norm: its scale costs less to compute than to load."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Any,
        k_weight: Any,
        head_dim: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        batch, length = q.shape[:2]
        ctx.shape = _shape(q, k, cos.shape[-1], head_dim, (q_weight is not None, k_weight is not None))
        ctx.sizes, ctx.eps = (q.shape, k.shape), eps
        outs = [x.new_empty(batch, length, x.shape[-1] // head_dim, head_dim) for x in (q, k)]
        _forward_kernel[(batch * length,)](
            q, k, cos, sin, q if q_weight is None else q_weight, k if k_weight is None else k_weight, *outs,
            *q.stride()[:2], *k.stride()[:2], *cos.stride()[:2], length, eps, **ctx.shape,
        )  # fmt: skip
        ctx.save_for_backward(
            q if q_weight is not None else None, k if k_weight is not None else None, cos, sin, q_weight, k_weight
        )
        return outs[0], outs[1]

    @staticmethod
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Any, ...]:
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        q_grad, k_grad = _rows_in_place(q_grad), _rows_in_place(k_grad)
        batch, length = q_grad.shape[:2]
        q_out, k_out = q_grad.new_empty(ctx.sizes[0]), k_grad.new_empty(ctx.sizes[1])
        # A power of two, so that few variants are compiled.
        tokens_each = power_of_two(-(-batch * length // MAX_PROGRAMS))
        programs = -(-batch * length // tokens_each)
        partial = torch.empty(programs, 2, ctx.shape["D"], dtype=torch.float32, device=q_grad.device)
        # Without a norm the kernel reads no input and no weight; any tensor stands for them.
        q, q_weight = (q_out, q_out) if q is None else (q, q_weight)
        k, k_weight = (k_out, k_out) if k is None else (k, k_weight)
        _backward_kernel[(programs,)](
            q_grad, k_grad, q, k, cos, sin, q_weight, k_weight, q_out, k_out, partial,
            *q_grad.stride()[:3], *k_grad.stride()[:3], *q.stride()[:2], *k.stride()[:2], *cos.stride()[:2],
            length, batch * length, ctx.eps, TOKENS=tokens_each, num_warps=8, **ctx.shape,
        )  # fmt: skip
        sums = partial.sum(dim=0)
        q_sum = sums[0].to(q_weight.dtype) if ctx.shape["Q_NORM"] else None
        k_sum = sums[1].to(k_weight.dtype) if ctx.shape["K_NORM"] else None
        return q_out, k_out, None, None, q_sum, k_sum, None, None


def _rows_in_place(x: Tensor) -> Tensor:
    """``x`` with whole rows side by side; a copy only where even a row is scattered."""
    return x if x.stride(-1) == 1 else x.contiguous()


def qk_norm_rope(
    q_BSP: Tensor,
    k_BSP: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalise every head of q and k and turn it by its position: two tensors ``[B, S, H, D]``.

    Keeps q and k as given for the backward pass (nothing of them without a norm); the weights' gradients add up in
    float32 in a fixed order. CPU tensors and mixed dtypes go through the reference.

    Args:
        q_BSP: output of the query projection; any strides, so a slice of a fused projection is read where it lies.
        k_BSP: of the key projection; may have another number of heads.
        cos: ``[B, S, R]``, or what expands to it; R is even and at most D, dims beyond R are not turned.
        sin: as ``cos``.
        head_dim: D.
        q_weight_D: weight of the norm over each query head; None leaves the norm out.
        k_weight_D: of each key head.
        eps: added to the mean square.
    """
    weights = [weight for weight in (q_weight_D, k_weight_D) if weight is not None]
    one_dtype = all(x.dtype == q_BSP.dtype for x in (k_BSP, cos, sin, *weights))
    fits = one_dtype and q_BSP.dtype in DTYPES and q_BSP.dim() == 3 and not (cos.requires_grad or sin.requires_grad)
    if not fits or not use_triton(q_BSP) or q_BSP.numel() == 0:
        return qk_norm_rope_reference(
            q_BSP, k_BSP, cos, sin, head_dim=head_dim, q_weight_D=q_weight_D, k_weight_D=k_weight_D, eps=eps
        )
    cos, sin = (x.expand(*q_BSP.shape[:2], -1) for x in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    q, k = _rows_in_place(q_BSP), _rows_in_place(k_BSP)
    return _QKNormRope.apply(q, k, cos, sin, q_weight_D, k_weight_D, head_dim, eps)
