"""Token counts of experts: what is counted, and the number that sums them up."""

from __future__ import annotations

import pytest
import torch
from transformers import AriaTextConfig, AutoModelForCausalLM

from moe_recipes.models.blocks import moe_blocks
from moe_recipes.moe.expert_load import ExpertLoad, count_only, counted_tokens, dead_experts, max_violation
from moe_recipes.train.run import _agreed_load
from tests.tiny_models import tiny_config


def test_max_violation_is_the_worst_layers_excess_over_its_mean():
    even, skewed = [5, 5, 5, 5], [1, 2, 2, 11]
    assert max_violation(torch.tensor([even])) == 0.0
    assert max_violation(torch.tensor([even, skewed])) == pytest.approx(11 / 4 - 1)
    assert max_violation(torch.tensor([skewed, even])) == pytest.approx(11 / 4 - 1)
    assert max_violation(torch.tensor([[0, 0, 0, 20]])) == pytest.approx(3.0)
    assert max_violation(torch.tensor([[0, 0], [0, 0]])) == 0.0


def test_dead_experts_are_those_without_a_token():
    assert dead_experts(torch.tensor([[0, 3, 0], [1, 1, 1]])).tolist() == [2, 0]


def test_only_training_passes_count():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=torch.float32)
    load = ExpertLoad({b.layer: b.experts for b in moe_blocks(model)}, num_experts=8, device=torch.device("cpu"))
    ids = torch.arange(20)[None]
    model.eval()
    model(input_ids=ids, use_cache=False)
    model.train()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert int(load.counts_LE.sum()) == 0
    model(input_ids=ids, use_cache=False)
    assert load.layers == [0, 1]
    assert load.counts_LE.sum(dim=1).tolist() == [40, 40]


def test_tokens_that_do_not_count_are_left_out_of_the_load():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=torch.float32)
    load = ExpertLoad({b.layer: b.experts for b in moe_blocks(model)}, num_experts=8, device=torch.device("cpu"))
    model.train()
    real = torch.arange(20)[None] < 17
    with count_only(real), count_only(torch.arange(20) > 1), count_only(None):
        model(input_ids=torch.arange(20)[None], use_cache=False)
    assert load.counts_LE.sum(dim=1).tolist() == [30, 30]
    assert counted_tokens() is None


def test_experts_are_counted_whatever_the_config_calls_them():
    config = AriaTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, moe_num_experts=6, moe_topk=2, moe_num_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    load = _agreed_load(AutoModelForCausalLM.from_config(config), torch.device("cpu"))
    assert load is not None
    assert load.counts_LE.shape == (2, 6)
