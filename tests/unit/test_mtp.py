"""Multi-token prediction: which blocks a checkpoint has, and what a position predicts."""

from __future__ import annotations

import pytest
import torch

from moe_recipes.config.errors import RecipeError
from moe_recipes.kernels.linear_cross_entropy import linear_cross_entropies
from moe_recipes.models.mtp import count_blocks, mtp_labels
from tests.tiny_models import mtp_tensors

DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 3, "num_nextn_predict_layers": 1}
NEMOTRON = {"model_type": "nemotron_h", "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}


def test_blocks_are_counted_from_the_files_and_for_random_weights_from_the_config() -> None:
    assert count_blocks(DEEPSEEK, mtp_tensors("deepseek_v3_mtp")) == 1
    assert count_blocks(NEMOTRON, mtp_tensors("nemotron_h_mtp")) == 1
    assert count_blocks(DEEPSEEK, ["model.layers.2.mlp.gate.weight"]) == 0
    assert count_blocks(DEEPSEEK, None) == 1
    assert count_blocks({**NEMOTRON, "num_nextn_predict_layers": 2}, None) == 1  # one block, whatever the depth
    assert count_blocks({"model_type": "nemotron_h"}, None) == 0
    assert count_blocks({"model_type": "qwen3_moe", "num_nextn_predict_layers": 1}, None) == 0
    with pytest.raises(RecipeError, match="not whole"):
        count_blocks(NEMOTRON, ["mtp.layers.1.norm.weight"])
    with pytest.raises(RecipeError, match=r"have 1 multi-token-prediction blocks, its config\.json speaks of 2"):
        count_blocks({**DEEPSEEK, "num_nextn_predict_layers": 2}, mtp_tensors("deepseek_v3_mtp"))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_label_crosses_a_border(depth: int) -> None:
    lengths = [[5, 1, 4], [2, 2, 6], [10]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    tokens = torch.arange(30).view(3, 10)
    labels = torch.full_like(tokens, -100)
    wanted = torch.full_like(tokens, -100)
    for row, parts in enumerate(lengths):
        start = 0
        for n in parts:
            for t in range(start, start + n):
                if t + 1 < start + n:
                    labels[row, t] = tokens[row, t + 1]
                if t + 1 + depth < start + n:
                    wanted[row, t] = tokens[row, t + 1 + depth]
            start += n
    assert torch.equal(mtp_labels(labels, positions, depth), wanted)


def test_several_losses_through_one_projection_have_the_gradients_of_their_weighted_sum() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (13,))
    labels[[2, 7]] = -100
    parts = [(5, 1.0), (5, 0.25), (3, 0.5)]
    total, losses = linear_cross_entropies(hidden, weight, labels, bias_V=bias, chunk_tokens=2, parts=parts)
    got = [total, *torch.autograd.grad(0.3 * total, (hidden, weight, bias))]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    plain = torch.stack([part.sum() for part in each.split([5, 5, 3])])
    expected = (plain * torch.tensor([1.0, 0.25, 0.5], dtype=torch.float64)).sum()
    want = [expected, *torch.autograd.grad(0.3 * expected, (hidden, weight, bias))]
    torch.testing.assert_close(losses, plain.detach())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
