"""Causal attention that never holds a matrix of scores: with documents, a sliding window, sinks, and values narrower
than keys. Through the kernels that torch has: cuDNN's for whole rows, FlashAttention-2 for windows and documents, its
counterpart on the CPU.

A sink is one more score of every row, without a value:  P_j = exp(s_j - lse'),  lse' = log(exp(lse) + exp(sink)).
No kernel has to know it. Forward: the output shrinks by exp(lse - lse'). Backward: a kernel rebuilds P from the lse
that it is handed, and takes dS = P (dP - <grad, out>); handed lse' and the shrunken output it computes exactly the
gradients of attention with a sink. What is left is d sink = -sum exp(sink - lse') <grad, out>.

Dimensions: B rows, S tokens, H heads of queries, G of keys and values, C width of queries and keys, V of values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton

CUDNN_SINCE = 91500
"""From this version on cuDNN's attention is torch's own first choice on an H100."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What of causal attention is no tensor of the autograd graph."""

    scale: float
    window: int | None = None
    """Tokens that a token sees, itself among them; None for all before it."""

    borders: Tensor | None = None
    """int32 on the device: where each document starts in the rows laid one after another, and B x S at the end. Rows
    are cut too. None where every row is one document."""


def supports(query: Tensor, value: Tensor) -> bool:
    """Whether a kernel takes tensors of this kind; whoever calls with others has to compute otherwise."""
    if not query.is_cuda:
        return query.dtype in (torch.float32, torch.bfloat16, torch.float64)
    widths = (query.shape[-1], value.shape[-1])
    return query.dtype in (torch.bfloat16, torch.float16) and all(w % 8 == 0 and w <= 256 for w in widths)


def allowed(mask: Mask, *, rows: int, length: int, device: torch.device) -> Tensor:
    """bool ``[B, 1, S, S]``: which token (last but one) sees which."""
    at_S = torch.arange(length, device=device)
    seen = at_S[:, None] >= at_S[None, :]
    if mask.window is not None:
        seen = seen & (at_S[:, None] - at_S[None, :] < mask.window)
    if mask.borders is None:
        return seen.expand(rows, 1, length, length)
    tokens = torch.arange(rows * length, device=device)
    document_BS = torch.searchsorted(mask.borders.long(), tokens, right=True).view(rows, length)
    return seen & (document_BS[:, None, :, None] == document_BS[:, None, None, :])


def attention_reference(
    query_BSHC: Tensor,
    key_BTGC: Tensor,
    value_BTGV: Tensor,
    sinks_H: Tensor | None,
    seen: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """As ``attention``, with every score in memory; queries and keys may differ in number.

    Args:
        seen: bool, broadcasts to ``[B, H, S, T]``; None where every query sees every key.
    """
    groups = query_BSHC.shape[2] // key_BTGC.shape[2]
    query, key, value = (t.transpose(1, 2) for t in (query_BSHC, key_BTGC, value_BTGV))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if seen is not None:
        # The lowest number and not -inf: a row of padding that sees nothing must stay a number.
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks_H is not None:
        sink = sinks_H.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    share = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (share @ value).transpose(1, 2)


@triton.jit
def _add_sink_kernel(  # type: ignore[no-untyped-def]
    out, lse, sinks, result, new_lse, S, row_stride, head_stride, token_stride,
    H: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, column = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    place = row * row_stride + head * head_stride + token * token_stride
    old = tl.load(lse + place, mask=head < H, other=0.0)
    sink = tl.load(sinks + head, mask=head < H, other=0.0).to(tl.float32)
    top = tl.maximum(old, sink)
    new = top + tl.log(tl.exp(old - top) + tl.exp(sink - top))
    tl.store(new_lse + place, new, mask=head < H)
    at = ((row * S + token) * H + head[:, None]) * V + column[None, :]
    inside = (head[:, None] < H) & (column[None, :] < V)
    value = tl.load(out + at, mask=inside, other=0.0).to(tl.float32) * tl.exp(old - new)[:, None]
    tl.store(result + at, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _sink_gradient_kernel(  # type: ignore[no-untyped-def]
    grad, out, lse, sinks, parts, S, row_stride, head_stride, token_stride,
    H: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, column = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    place = row * row_stride + head * head_stride + token * token_stride
    share = tl.exp(
        tl.load(sinks + head, mask=head < H, other=0.0).to(tl.float32) - tl.load(lse + place, mask=head < H, other=0.0)
    )
    at = ((row * S + token) * H + head[:, None]) * V + column[None, :]
    inside = (head[:, None] < H) & (column[None, :] < V)
    product = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(parts + (row * S + token) * H + head, -share * tl.sum(product, axis=1), mask=head < H)


def add_sink(out_BSHV: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of attention with sinks from those without."""
    rows, length, heads, width = out_BSHV.shape
    if not use_triton(out_BSHV):
        sinks = sinks_H.to(lse_BHS.dtype)[:, None].expand_as(lse_BHS)
        new_BHS = torch.logaddexp(lse_BHS, sinks)
        factor = (lse_BHS - new_BHS).exp().transpose(1, 2)[..., None]
        return (out_BSHV * factor).to(out_BSHV.dtype), new_BHS
    out_BSHV, new_BHS = out_BSHV.contiguous(), torch.empty_like(lse_BHS)
    lse_BHS = lse_BHS if lse_BHS.stride() == new_BHS.stride() else torch.empty_like(new_BHS).copy_(lse_BHS)
    result = torch.empty_like(out_BSHV)
    _add_sink_kernel[(rows, length)](
        out_BSHV, lse_BHS, sinks_H, result, new_BHS, length, lse_BHS.stride(0), lse_BHS.stride(1), lse_BHS.stride(2),
        H=heads, V=width, HEADS=power_of_two(heads), WIDTH=power_of_two(width),
    )  # fmt: skip
    return result, new_BHS


def sink_gradient(grad_BSHV: Tensor, out_BSHV: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """``[H]``, from the output and the lse with sinks."""
    rows, length, heads, width = out_BSHV.shape
    if not use_triton(out_BSHV):
        share_BSH = (sinks_H.to(lse_BHS.dtype)[:, None] - lse_BHS).exp().transpose(1, 2)
        wide = torch.promote_types(out_BSHV.dtype, torch.float32)
        parts = -share_BSH * (grad_BSHV.to(wide) * out_BSHV.to(wide)).sum(-1)
        return parts.sum((0, 1)).to(sinks_H.dtype)
    parts = torch.empty(rows * length, heads, dtype=torch.float32, device=out_BSHV.device)
    _sink_gradient_kernel[(rows, length)](
        grad_BSHV.contiguous(), out_BSHV.contiguous(), lse_BHS, sinks_H, parts, length,
        lse_BHS.stride(0), lse_BHS.stride(1), lse_BHS.stride(2),
        H=heads, V=width, HEADS=power_of_two(heads), WIDTH=power_of_two(width),
    )  # fmt: skip
    return parts.sum(0).to(sinks_H.dtype)


def _widened(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))


class _OnCpu:
    """torch's FlashAttention on the CPU; it has no groups of heads and no documents, so it gets copies and a mask."""

    @staticmethod
    def _arguments(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[list[Tensor], Tensor | None]:
        groups, width = query.shape[2] // key.shape[2], query.shape[3]
        key, value = key.repeat_interleave(groups, 2), _widened(value, width).repeat_interleave(groups, 2)
        seen = None
        if mask.window is not None or mask.borders is not None:
            rows, length = query.shape[:2]
            seen = allowed(mask, rows=rows, length=length, device=query.device)
            seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        return [t.transpose(1, 2) for t in (query, key, value)], seen

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        tensors, seen = cls._arguments(query, key, value, mask)
        out_BHSC, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, seen is None, attn_mask=seen, scale=mask.scale
        )
        return out_BHSC.transpose(1, 2)[..., : value.shape[-1]], lse_BHS, ()

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Mask,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors, seen = cls._arguments(query, key, value, mask)
        grad, out = (_widened(t, query.shape[3]).transpose(1, 2) for t in (grad, out))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *tensors, out, lse, 0.0, seen is None, attn_mask=seen, scale=mask.scale
        )
        grad_query, grad_key, grad_value = (t.transpose(1, 2) for t in found)
        split = (key.shape[2], query.shape[2] // key.shape[2])
        grad_key, grad_value = (t.unflatten(2, split).sum(3) for t in (grad_key, grad_value))
        return grad_query, grad_key, grad_value[..., : value.shape[-1]]


class _Flash2:
    """FlashAttention-2, which skips what a window or a border hides; values as wide as keys."""

    @staticmethod
    def _lengths(query: Tensor, mask: Mask) -> tuple[Any, ...]:
        longest = query.shape[1]  # no document is longer; the bound only sizes the launch
        return mask.borders, mask.borders, longest, longest, 0.0, True

    @staticmethod
    def _options(mask: Mask) -> dict[str, Any]:
        if mask.window is None:
            return {"scale": mask.scale}
        return {"scale": mask.scale, "window_size_left": mask.window - 1, "window_size_right": 0}

    @staticmethod
    def _laid_out(tensor: Tensor, width: int, mask: Mask) -> Tensor:
        tensor = _widened(tensor, width)
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        return tensor if mask.borders is None else tensor.flatten(0, 1)

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        tensors = [cls._laid_out(t, query.shape[3], mask) for t in (query, key, value)]
        out, lse, *kept, _ = torch.ops.aten._flash_attention_forward(
            *tensors, *cls._lengths(query, mask), False, **cls._options(mask)
        )
        if mask.borders is not None:  # lse is [H, B x S] there
            out, lse = out.unflatten(0, query.shape[:2]), lse.unflatten(1, query.shape[:2]).transpose(0, 1)
        return out[..., : value.shape[-1]], lse, tuple(kept)

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Mask,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        width = query.shape[3]
        tensors = [cls._laid_out(t, width, mask) for t in (query, key, value)]
        grad, out = (cls._laid_out(t, width, mask) for t in (grad, out))
        if mask.borders is not None:
            lse = lse.transpose(0, 1).flatten(1)
        found = torch.ops.aten._flash_attention_backward(
            grad, *tensors, out, lse.contiguous(), *cls._lengths(query, mask), *kept, **cls._options(mask)
        )
        shaped = [t.view(*query.shape[:2], *t.shape[-2:]) for t in found]
        return shaped[0], shaped[1], shaped[2][..., : value.shape[-1]]


class _CuDNN:
    """cuDNN's attention over whole rows."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        tensors = [t.transpose(1, 2) for t in (query, key, value)]
        out, lse, *kept, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *tensors, None, True, 0.0, True, False, scale=mask.scale
        )
        cum_q, cum_k, max_q, max_k, seed, offset = kept
        found = (lse.shape, seed, offset, None, cum_q, cum_k, max_q, max_k)
        return out.transpose(1, 2), lse.view(*out.shape[:3]), found

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Mask,
        kept: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        shape, *kept_rest = kept
        tensors = [t.transpose(1, 2) for t in (grad, query, key, value, out)]
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse.reshape(shape), *kept_rest, 0.0, True, scale=mask.scale
        )
        return tuple(t.transpose(1, 2) for t in found)


def _kernel(query: Tensor, mask: Mask) -> type[_OnCpu] | type[_Flash2] | type[_CuDNN]:
    if not query.is_cuda:
        return _OnCpu
    whole = mask.window is None and mask.borders is None
    recent = (torch.backends.cudnn.version() or 0) >= CUDNN_SINCE
    hopper = torch.cuda.get_device_capability(query.device) >= (9, 0)
    return _CuDNN if whole and recent and hopper else _Flash2


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks_H: Tensor | None, mask: Mask) -> Tensor:
        ctx.kernel = _kernel(query, mask)
        out, lse, ctx.kept = ctx.kernel.forward(query, key, value, mask)
        if sinks_H is not None:
            out, lse = add_sink(out, lse, sinks_H)
        ctx.mask = mask
        ctx.save_for_backward(query, key, value, out, lse, sinks_H)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, sinks_H = ctx.saved_tensors
        grads = ctx.kernel.backward(grad, query, key, value, out, lse, ctx.mask, ctx.kept)
        grad_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            grad_sinks = sink_gradient(grad, out, lse, sinks_H)
        return *grads, grad_sinks, None


def attention(
    query_BSHC: Tensor, key_BSGC: Tensor, value_BSGV: Tensor, *, mask: Mask, sinks_H: Tensor | None = None
) -> Tensor:
    """Causal attention ``[B, S, H, V]``; the tensors must be ones that it ``supports``.

    Keeps its inputs, its output and one float32 a row and head for the backward pass.
    """
    if mask.window is not None and mask.window >= query_BSHC.shape[1]:
        mask = replace(mask, window=None)
    return _Attention.apply(query_BSHC, key_BSGC, value_BSGV, sinks_H, mask)
