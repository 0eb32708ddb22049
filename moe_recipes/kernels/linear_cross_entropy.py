"""Fused output projection and cross-entropy: the loss of ``hidden @ weight.T`` without ever holding all logits.

The logits of a 4096-token row over 151,936 words are 1.2 GB in bfloat16 and 2.5 GB once upcast. Here they exist for
``chunk_tokens`` tokens at a time. Both gradients are formed in the forward pass, while a chunk's logits are at
hand, so the backward pass only scales them; the price is one gradient-sized buffer for ``weight`` held meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def linear_cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """The same sum with whole logits, as Transformers computes it: a float32 scalar."""
    logits_TV = F.linear(hidden_TD, weight_VD, bias_V).float()
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, bias_V: Tensor | None, chunk: int
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_bias = bias_V is not None and ctx.needs_input_grad[3]
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        # Partial sums of the weight gradient over chunks: float32, or bfloat16 rounding would grow with their number.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None  # type: ignore[arg-type]
        for start in range(0, len(hidden_TD), chunk):
            rows = slice(start, start + chunk)
            hidden_CD, labels_C = hidden_TD[rows], labels_T[rows]
            learned_C = labels_C != IGNORE_INDEX
            index_C1 = labels_C.clamp(min=0).unsqueeze(1)
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()
            log_sum_C = logits_CV.logsumexp(dim=1)
            picked_C = logits_CV.gather(1, index_C1).squeeze(1)
            loss += ((log_sum_C - picked_C) * learned_C).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            # d loss / d logits = softmax - onehot, in place of the logits.
            logits_CV.sub_(log_sum_C.unsqueeze(1)).exp_()
            logits_CV.scatter_add_(1, index_C1, logits_CV.new_full(index_C1.shape, -1.0))
            logits_CV.mul_(learned_C.unsqueeze(1))
            if grad_bias is not None:
                grad_bias += logits_CV.sum(dim=0)
            grad_CV = logits_CV.to(hidden_TD.dtype)
            del logits_CV
            if grad_hidden is not None:
                grad_hidden[rows] = grad_CV @ weight_VD
            if grad_weight is not None:
                grad_weight += grad_CV.T @ hidden_CD
        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight_VD.dtype) if grad_weight is not None else None,
            grad_bias.to(bias_V.dtype) if grad_bias is not None and bias_V is not None else None,
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors

        def scaled(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else grad * grad_loss.to(grad.dtype)

        return scaled(grad_hidden), scaled(grad_weight), None, scaled(grad_bias), None


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, bias_V: Tensor | None = None, chunk_tokens: int = 2048
) -> Tensor:
    """Sum over labelled tokens of the cross-entropy of ``hidden @ weight.T + bias``: a float32 scalar.

    Args:
        hidden_TD: last hidden states, local, bfloat16 or float32.
        weight_VD: output projection, whole (gathered), same dtype.
        labels_T: int64 in [0, V), or -100 for tokens without loss.
        chunk_tokens: tokens whose logits exist at once; memory is ``chunk_tokens * V * 6`` bytes in bfloat16.
    """
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, bias_V, chunk_tokens)
