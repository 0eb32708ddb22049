"""Random weights drawn shard by shard: equal for every layout, and distributed as the family draws them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models import sharded_init
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import whole
from tests.tiny_models import tiny_config

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "llama", "llama_tied")
BLOCK_ELEMENTS = 1 << 10
"""Small, so that tiny parameters have several blocks and shards cut through them."""


def config_of(family: str) -> transformers.PreTrainedConfig:
    config = tiny_config(family)
    config.pad_token_id = 7
    return config


def drawn(family: str, *, seed: int, dtype: torch.dtype = torch.float32, **layout: int) -> dict[str, torch.Tensor]:
    """Whole parameters and buffers of a model on these ranks."""
    sharded_init.BLOCK_ELEMENTS = BLOCK_ELEMENTS
    model = AutoModelForCausalLM.from_config(
        config_of(family),
        distributed_config=transformers.distributed.DistributedConfig(**layout),
        seed=seed,
        dtype=dtype,
    )
    return {name: whole(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def write_alone(folder: Path) -> None:
    for family in FAMILIES:
        torch.save(drawn(family, seed=7, fsdp_size=1), folder / f"{family}.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``FAMILY.pt``: what one process draws."""
    folder = tmp_path_factory.mktemp("init")
    run_on_ranks(write_alone, 1, folder)
    return folder


def check_layout(folder: Path, layout: dict[str, int]) -> None:
    for family in FAMILIES:
        if layout.get("ep_size", 1) > 1 and family.startswith("llama"):
            continue
        want = torch.load(folder / f"{family}.pt")
        got = drawn(family, seed=7, **layout)
        assert got.keys() == want.keys()
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], family


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, {"fsdp_size": 2}),
        (2, {"fsdp_size": 2, "ep_size": 2}),
        (3, {"fsdp_size": 3}),
        (4, {"fsdp_size": 4, "ep_size": 2}),
        pytest.param(4, {"fsdp_size": 2, "ep_size": 2, "dp_replicate_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_layout_draws_the_same_weights(alone, num_ranks, layout):
    run_on_ranks(check_layout, num_ranks, alone, layout)


def check_statistics(folder: Path) -> None:
    for family in FAMILIES:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
        want = dict([*model.named_parameters(), *model.named_buffers()])
        got = torch.load(folder / f"{family}.pt")
        assert got.keys() == want.keys()
        for name, tensor in got.items():
            expected = want[name].detach()
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
            if expected.float().std() == 0 or tensor.ndim < 2:
                continue
            count, std = tensor.numel(), float(expected.std())
            # Both are samples: their means and deviations differ by this much in about one of 10^5 tensors.
            assert abs(float(tensor.std()) / std - 1) < 4.5 / count**0.5, f"{family} {name}"
            assert abs(float(tensor.mean() - expected.mean())) < 4.5 * std * (2 / count) ** 0.5, f"{family} {name}"
        constant = [name for name, tensor in want.items() if tensor.numel() > 1 and tensor.float().std() == 0]
        assert any("norm" in name for name in constant)
        for name in constant:
            assert torch.equal(got[name], want[name].detach()), f"{family} {name}"


def test_statistics_are_those_of_transformers(alone):
    run_on_ranks(check_statistics, 1, alone)


def test_the_padding_row_is_zero_where_transformers_makes_it_zero(alone):
    for family in FAMILIES:
        model = transformers.AutoModelForCausalLM.from_config(config_of(family))
        embedding = model.get_input_embeddings().weight
        name = next(name for name, tensor in model.named_parameters() if tensor is embedding)
        rows = torch.load(alone / f"{family}.pt")[name]
        assert torch.equal(rows.abs().amax(dim=1) == 0, embedding.abs().amax(dim=1) == 0), family


def check_draws(folder: Path) -> None:
    seven, eight = torch.load(folder / "qwen3_moe.pt"), drawn("qwen3_moe", seed=8, fsdp_size=1)
    drawn_names = [name for name, tensor in seven.items() if tensor.ndim > 1]
    assert len(drawn_names) > 10
    parts = []
    for name in drawn_names:
        assert not torch.equal(seven[name], eight[name]), name
        parts += list(seven[name].flatten().split(64))
    values = torch.stack([part for part in parts if part.abs().max() > 0])
    assert len(values.unique(dim=0)) == len(values)  # no two runs of 64 values are equal, within a tensor or between
    sixteen_bit = drawn("qwen3_moe", seed=7, dtype=torch.bfloat16, fsdp_size=1)
    for name in drawn_names:
        assert torch.equal(sixteen_bit[name], seven[name].to(sixteen_bit[name].dtype)), name


def test_seeds_tensors_and_blocks_all_differ(alone):
    run_on_ranks(check_draws, 1, alone)
