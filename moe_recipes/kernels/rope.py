"""Rotary position embedding over the halves of each head, in one pass each way. Eager Transformers makes about six."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton


def rope_reference(x_THC: Tensor, cos_TA: Tensor, sin_TA: Tensor) -> Tensor:
    """As ``rope``, one torch operation after the other."""
    cos, sin = cos_TA[:, None], sin_TA[:, None]
    first, second = x_THC.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, out, token_stride, sign,
    H: tl.constexpr, A: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, angle = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < H) & (angle < A)
    c = tl.load(cos + token * A + angle, mask=angle < A, other=0.0).to(tl.float32)
    s = tl.load(sin + token * A + angle, mask=angle < A, other=0.0).to(tl.float32) * sign
    source = x + token * token_stride + head * 2 * A + angle
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + A, mask=inside, other=0.0).to(tl.float32)
    target = out + (token * H + head) * 2 * A + angle
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + A, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def _turn(x_THC: Tensor, cos_TA: Tensor, sin_TA: Tensor, sign: float) -> Tensor:
    tokens, heads, width = x_THC.shape
    out = torch.empty((tokens, heads, width), dtype=x_THC.dtype, device=x_THC.device)
    _kernel[(tokens,)](
        x_THC, cos_TA, sin_TA, out, x_THC.stride(0), sign,
        H=heads, A=width // 2, HEADS=power_of_two(heads), HALF=power_of_two(width // 2),
    )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    """Keeps the angles alone; the way back is the same turn the other way."""

    @staticmethod
    def forward(ctx: Any, x_THC: Tensor, cos_TA: Tensor, sin_TA: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TA, sin_TA)
        return _turn(x_THC, cos_TA, sin_TA, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THC: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad_THC.contiguous(), *ctx.saved_tensors, -1.0), None, None


def rope(x_THC: Tensor, cos_TA: Tensor, sin_TA: Tensor) -> Tensor:
    """``[T, H, C]``: channel a and channel a + C/2 of each head turned by angle a of the token.

    Args:
        x_THC: heads and channels side by side; tokens may lie further apart.
        cos_TA, sin_TA: A = C/2 angles a token.
    """
    if not use_triton(x_THC) or x_THC.numel() == 0:
        return rope_reference(x_THC, cos_TA, sin_TA)
    return _Rope.apply(x_THC, cos_TA.contiguous(), sin_TA.contiguous())
