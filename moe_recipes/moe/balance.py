"""The load-balancing loss of Transformers, without its one-hot tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], *, top_k: int) -> Tensor:
    """``E * sum_e share_of_choices_e * mean_probability_e`` over the tokens of all layers together: a scalar.

    Equal to ``load_balancing_loss_func`` of Transformers without an attention mask, which builds a
    ``[layers * T, K, E]`` integer tensor for it: 6 GB at 48 layers, 16,384 tokens and 128 experts.

    Args:
        router_logits: one ``[T, E]`` a layer, local tokens. The choices carry no gradient, the probabilities do.
    Source: arXiv:2101.03961, equations 4 to 6.
    """
    num_experts = router_logits[0].shape[-1]
    counts_E = torch.zeros(num_experts, device=router_logits[0].device)
    total_E = torch.zeros_like(counts_E)
    tokens = 0
    for logits_TE in router_logits:
        probability_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
        chosen = probability_TE.detach().topk(top_k, dim=-1).indices.flatten()
        counts_E = counts_E.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        total_E = total_E + probability_TE.sum(dim=0)
        tokens += logits_TE.shape[0]
    return num_experts * (counts_E / tokens * total_E / tokens).sum()
