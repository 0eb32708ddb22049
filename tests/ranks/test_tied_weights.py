"""A model drawn on several ranks whose output projection is its embedding: one tensor, and its gradient is whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import Gemma3TextConfig
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import whole
from tests.tiny_models import tiny_config


def config_of(family: str) -> transformers.PreTrainedConfig:
    if family == "gemma3":  # scales its embedding by a buffer without dimensions
        return Gemma3TextConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
    config = tiny_config(family.removesuffix("_tied"))
    config.tie_word_embeddings = True
    return config


def rows_of(rank: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(rank))


def check_gradients(family: str, ep_size: int) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layout = DistributedConfig(fsdp_size=num_ranks, ep_size=ep_size)
    config = config_of(family)
    model = AutoModelForCausalLM.from_config(config, distributed_config=layout, seed=3, dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    plain.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})

    model(input_ids=rows_of(rank), labels=rows_of(rank)).loss.backward()
    for one in range(num_ranks):
        (plain(input_ids=rows_of(one), labels=rows_of(one)).loss / num_ranks).backward()
    want = dict(plain.named_parameters())
    assert want.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        difference = (whole(parameter.grad) - want[name].grad).norm()
        assert difference <= 1e-5 * want[name].grad.norm(), name


@pytest.mark.parametrize(("family", "ep_size"), [("qwen3_moe_tied", 2), ("llama_tied", 1), ("gemma3", 1)])
def test_gradients_are_those_of_one_process(family: str, ep_size: int) -> None:
    run_on_ranks(check_gradients, 2, family, ep_size)
