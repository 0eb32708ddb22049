"""What keeps experts evenly loaded: the load-balancing loss, the z-loss, and the update of correction biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_recipes.families import CORRECTION_BIAS


def load_balancing_loss(router_logits: Sequence[Tensor], *, top_k: int, real_T: Tensor | None = None) -> Tensor:
    """``E * sum_e share_of_choices_e * mean_probability_e`` over the tokens of all layers together: a scalar.

    Equal to ``load_balancing_loss_func`` of Transformers, which up to 5.23 built a ``[layers * T, K, E]`` integer
    tensor for it: 6 GB at 48 layers, 16,384 tokens and 128 experts.

    Args:
        router_logits: one ``[T, E]`` a layer, local tokens. The choices carry no gradient, the probabilities do.
        real_T: bool, what is not padding: Transformers' attention mask. None: all.
    Source: arXiv:2101.03961, equations 4 to 6.
    """
    num_experts = router_logits[0].shape[-1]
    counts_E = torch.zeros(num_experts, device=router_logits[0].device)
    total_E = torch.zeros_like(counts_E)
    weight_T = torch.ones_like(router_logits[0][:, 0], dtype=torch.float32) if real_T is None else real_T.float()
    for logits_TE in router_logits:
        probability_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
        chosen_TK = probability_TE.detach().topk(top_k, dim=-1).indices
        counts_E = counts_E.scatter_add(0, chosen_TK.flatten(), weight_T.repeat_interleave(top_k))
        total_E = total_E + (weight_T[:, None] * probability_TE).sum(dim=0)
    tokens = weight_T.sum() * len(router_logits)
    return num_experts * (counts_E / tokens * total_E / tokens).sum()


def router_z_loss(router_logits: Sequence[Tensor], *, real_T: Tensor | None = None) -> Tensor:
    """``mean over tokens of logsumexp(logits)^2``, summed over the layers: a float32 scalar. Keeps logits small.

    Args:
        router_logits: one ``[T, E]`` a layer, local tokens, with gradient.
        real_T: bool, what is not padding; None: all.
    Source: arXiv:2202.08906, equation 5.
    """
    squares_LT = torch.stack([logits_TE.float().logsumexp(dim=-1).square() for logits_TE in router_logits])
    if real_T is None:
        return squares_LT.mean(dim=1).sum()
    return (squares_LT * real_T).sum() / real_T.sum()


@torch.no_grad()
def update_correction_biases(
    routers: Mapping[int, nn.Module], layers: Sequence[int], counts_LE: Tensor, *, rate: float
) -> None:
    """Raise the bias of each expert with less than its layer's mean load by ``rate``, lower that of each with more.

    Every rank must have the same counts, those of all ranks and microbatches of a step: then all ranks keep the same
    biases without talking.

    Args:
        routers: by layer, each with the float32 buffer ``e_score_correction_bias`` ``[E]``.
        layers, counts_LE: the rows of the int64 counts on the CPU; a layer without any token keeps its biases.
    Source: arXiv:2408.15664, algorithm 1.
    """
    # In whole numbers: a mean in floating point could make two equal loads differ.
    sign_LE = (counts_LE.sum(dim=1, keepdim=True) - counts_LE * counts_LE.shape[1]).sign()
    for layer, sign_E in zip(layers, sign_LE, strict=True):
        if layer in routers:
            bias_E = getattr(routers[layer], CORRECTION_BIAS)
            bias_E.add_(sign_E.to(bias_E), alpha=rate)
