"""Fused output projection and cross-entropy: the loss of ``hidden @ weight.T`` without ever holding all logits.

The logits of a 4096-token row over 151,936 words are 1.2 GB in bfloat16 and 2.5 GB once upcast. Here they exist for
``chunk_tokens`` tokens at a time. Both gradients are formed in the forward pass, while a chunk's logits are at
hand, so the backward pass only scales them; the price is one gradient-sized buffer for ``weight`` held meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_recipes.kernels.triton import power_of_two, tl, triton, use_triton

IGNORE_INDEX = -100


def linear_cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """The same sum with whole logits, as Transformers computes it: a float32 scalar."""
    logits_TV = F.linear(hidden_TD, weight_VD, bias_V).float()
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def softmax_loss_reference(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row, float32 (0 without a label), and d loss / d logits, softmax - onehot, in the logits' dtype."""
    learned_C = labels_C != IGNORE_INDEX
    index_C1 = labels_C.clamp(min=0).unsqueeze(1)
    values_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32), copy=True)
    log_sum_C = values_CV.logsumexp(dim=1)
    loss_C = (log_sum_C - values_CV.gather(1, index_C1).squeeze(1)) * learned_C
    values_CV.sub_(log_sum_C.unsqueeze(1)).exp_()
    values_CV.scatter_add_(1, index_C1, values_CV.new_full(index_C1.shape, -1.0))
    values_CV.mul_(learned_C.unsqueeze(1))
    return loss_C, values_CV.to(logits_CV.dtype)


@triton.jit
def _softmax_loss_kernel(logits, labels, loss, V: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * V
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        total = total * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
    top = tl.max(highest, axis=0)
    total = tl.where(highest == float("-inf"), 0.0, total * tl.exp(highest - top))
    log_sum = tl.log(tl.sum(total, axis=0)) + top
    learned = label != IGNORE
    picked = tl.load(logits + tl.where(learned, label, 0)).to(tl.float32)
    tl.store(loss + row, tl.where(learned, log_sum - picked, 0.0))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        grad = tl.exp(value - log_sum) - tl.where(column == label, 1.0, 0.0)
        grad = tl.where(learned, grad, 0.0)
        tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < V)


def softmax_loss(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; on a GPU the gradient overwrites the logits: two reads and one write of them in all."""
    if not use_triton(logits_CV):
        return softmax_loss_reference(logits_CV, labels_C)
    rows, words = logits_CV.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    block = min(4096, power_of_two(words))
    _softmax_loss_kernel[(rows,)](logits_CV, labels_C, loss_C, words, IGNORE=IGNORE_INDEX, BLOCK=block, num_warps=8)
    return loss_C, logits_CV


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """``total += factor * left @ right``, the sum in ``total``'s dtype; on a GPU inside the product, a pass over memory
    less."""
    if total.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, alpha=factor, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right, alpha=factor)


def _chunks(parts: Sequence[tuple[int, float]], chunk: int) -> Iterator[tuple[int, float, slice]]:
    """``(part, its factor, rows)``, each within one part."""
    start = 0
    for part, (rows, factor) in enumerate(parts):
        for first in range(start, start + rows, chunk):
            yield part, factor, slice(first, min(first + chunk, start + rows))
        start += rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        bias_V: Tensor | None,
        chunk: int,
        parts: Sequence[tuple[int, float]],
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_bias = bias_V is not None and ctx.needs_input_grad[3]
        accumulate = torch.promote_types(hidden_TD.dtype, torch.float32)
        losses_P = hidden_TD.new_zeros(len(parts), dtype=accumulate)
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        # Partial sums of the weight gradient over chunks: float32, or bfloat16 rounding would grow with their number.
        grad_weight = torch.zeros_like(weight_VD, dtype=accumulate) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=accumulate) if need_bias else None  # type: ignore[arg-type]
        for part, factor, rows in _chunks(parts, chunk):
            loss_C, grad_CV = softmax_loss(F.linear(hidden_TD[rows], weight_VD, bias_V), labels_T[rows])
            losses_P[part] += loss_C.sum()
            if grad_bias is not None:
                grad_bias.add_(grad_CV.sum(dim=0, dtype=accumulate), alpha=factor)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[rows])
                if factor != 1:
                    grad_hidden[rows] *= factor
            if grad_weight is not None:
                _add_product(grad_weight, grad_CV.T, hidden_TD[rows], factor)
            del grad_CV
        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight_VD.dtype) if grad_weight is not None else None,
            grad_bias.to(bias_V.dtype) if grad_bias is not None and bias_V is not None else None,
        )
        ctx.mark_non_differentiable(losses_P)
        total = losses_P[0].clone()
        for loss, (_, factor) in zip(losses_P[1:], parts[1:], strict=True):
            total = total + factor * loss
        return total, losses_P

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors

        def scaled(grad: Tensor | None) -> Tensor | None:
            if grad is None:
                return None
            # In float32: rounded to bfloat16, the factor alone would be off by up to 0.4 %, and with it every gradient.
            out = torch.empty_like(grad)
            for part, target in zip(grad.split(4096), out.split(4096), strict=True):
                target.copy_(part.to(grad_loss.dtype) * grad_loss)
            return out

        return scaled(grad_hidden), scaled(grad_weight), None, scaled(grad_bias), None, None


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, bias_V: Tensor | None = None, chunk_tokens: int = 2048
) -> Tensor:
    """Sum over labelled tokens of the cross-entropy of ``hidden @ weight.T + bias``: a float32 scalar.

    Args:
        hidden_TD: last hidden states, local, bfloat16 or float32.
        weight_VD: output projection, whole (gathered), same dtype.
        labels_T: int64 in [0, V), or -100 for tokens without loss.
        chunk_tokens: tokens whose logits exist at once, ``chunk_tokens * V`` values of the hidden states' dtype.
    """
    return linear_cross_entropies(
        hidden_TD, weight_VD, labels_T, bias_V=bias_V, chunk_tokens=chunk_tokens, parts=((len(hidden_TD), 1.0),)
    )[0]


def linear_cross_entropies(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    parts: Sequence[tuple[int, float]],
    bias_V: Tensor | None = None,
    chunk_tokens: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Several losses through one output projection, with one buffer for its gradient.

    Args:
        parts: ``(rows, factor)`` of each loss, in the order of the rows; the first factor is 1.
        others: as ``linear_cross_entropy``.
    Returns:
        The sum of factor times loss, which has the gradients, and each loss by itself without one ``[P]``; float32.
    """
    if not torch.is_grad_enabled():
        # Autograd functions are told of a weight that wants a gradient even where none is recorded: without this a
        # validation would form all gradients and hold a buffer for them.
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, bias_V, chunk_tokens, tuple(parts))
