"""Counts from a config.json alone, beside the model that Transformers builds of it on the meta device."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_recipes.config.errors import RecipeError
from moe_recipes.config.model_config import PACKAGED, PACKAGED_NAMES, hybrid_layers
from moe_recipes.families import CORRECTION_BIAS, PUBLISHED, family_of
from moe_recipes.plan.parameters import ParameterCount, count_parameters
from tests.tiny_models import mtp_tensors, tiny_config

NAMES = sorted(folder.name for folder in PACKAGED.iterdir() if (folder / "config.json").is_file())


def packaged(name: str) -> dict[str, Any]:
    return json.loads((PACKAGED / name / "config.json").read_bytes())


def counted_by_transformers(config: dict[str, Any]) -> tuple[int, int]:
    """All parameters, and those of routed experts, of the model that Transformers makes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)


def count(config: dict[str, Any]) -> ParameterCount:
    found = count_parameters(config)
    assert found is not None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configs_count_as_transformers_builds_them(name: str) -> None:
    config = packaged(name)
    found = count(config)
    assert (found.total, found.routed) == counted_by_transformers(config)
    family = family_of(config)
    assert family is not None
    per_token, experts = config["num_experts_per_tok"], config[family.experts.count_key]
    assert found.active == found.total - found.routed + found.routed * per_token // experts


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_latent_size": None},
        {"mlp_bias": True},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"tie_word_embeddings": True},
        {"hybrid_override_pattern": "M-M-*-ME"},
        {"hybrid_override_pattern": "M*M*"},
        {"n_groups": 4, "ssm_state_size": 8, "conv_kernel": 3, "mamba_num_heads": 4, "num_key_value_heads": 1},
        {"moe_shared_expert_intermediate_size": 112, "moe_latent_size": 16, "n_routed_experts": 16},
    ],
)
def test_every_part_of_nemotron_h_is_counted(changes: dict[str, Any]) -> None:
    config = {**packaged("tiny_nemotron_h"), **changes}
    assert (count(config).total, count(config).routed) == counted_by_transformers(config)


def test_the_published_sizes() -> None:
    counts = {name: count(packaged(name)) for name in NAMES}
    billions = {name: [f"{n / 1e9:.2f}" for n in (c.total, c.routed, c.active)] for name, c in counts.items()}
    assert billions["nemotron_3_ultra_550b"] == ["549.31", "515.40", "56.06"]
    assert billions["nemotron_3_nano_30b"] == ["31.58", "29.37", "3.58"]
    assert billions["qwen3_30b_a3b"] == ["30.53", "28.99", "3.35"]
    assert set(PACKAGED_NAMES.values()) <= set(NAMES)
    for model in PUBLISHED.values():
        found = counts[model.packaged]
        rounded = [round(n / 1e9, 2) for n in (found.total, found.active, found.routed, found.mtp)]
        assert rounded == [model.total, model.active, model.routed, model.mtp], model.name


def test_counts_agree_to_the_last_parameter_with_what_the_hub_publishes() -> None:
    """The hub's own numbers: parameters by dtype of a repository, and ``total_size`` of an index.

    GPT-OSS's are parameters in all files, and of them those in 4 bits. Ultra's index also holds the layers that predict
    further tokens, and 49 correction biases in float32; all else is bfloat16.
    """
    assert (count(packaged("gpt_oss_20b")).total, count(packaged("gpt_oss_120b")).total) == (
        1_804_459_584 + 19_110_297_600,
        2_167_371_072 + 114_661_785_600,
    )
    ultra = packaged("nemotron_3_ultra_550b")
    biases = (hybrid_layers(ultra) or []).count("moe") + 1
    assert 2 * count(ultra).trained + 4 * biases * ultra["n_routed_experts"] == 1_121_049_257_984
    assert 2 * count(packaged("qwen3_30b_a3b")).total == 61_064_245_248
    for model in PUBLISHED.values():
        if model.file_bytes is not None:
            assert model.file_bytes == pytest.approx(2 * count(packaged(model.packaged)).trained, rel=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_layers_that_predict_further_tokens_are_counted(family: str) -> None:
    """Against the tensors of a checkpoint, made by the published names and shapes."""
    config = tiny_config(f"{family}_mtp").to_dict()
    tensors = mtp_tensors(f"{family}_mtp")
    assert count(config).mtp == sum(t.numel() for n, t in tensors.items() if not n.endswith(CORRECTION_BIAS))
    assert count(tiny_config(family).to_dict()).mtp == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 0, "n_shared_experts": 2, "n_routed_experts": 16, "v_head_dim": 8},
    ],
)
def test_every_part_of_deepseek_v3_is_counted(changes: dict[str, Any]) -> None:
    config = {**packaged("tiny_deepseek_v3"), **changes}
    assert (count(config).total, count(config).routed) == counted_by_transformers(config)


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": False}, {"tie_word_embeddings": True}, {"num_local_experts": 4, "head_dim": 8}],
)
def test_every_part_of_gpt_oss_is_counted(changes: dict[str, Any]) -> None:
    config = {**packaged("tiny_gpt_oss"), **changes}
    assert (count(config).total, count(config).routed) == counted_by_transformers(config)


def test_layer_kinds_are_read_in_every_spelling() -> None:
    wanted = ["linear_attention", "moe", "full_attention", "mlp"]
    assert hybrid_layers({"hybrid_override_pattern": "ME*-"}) == wanted
    assert hybrid_layers({"layers_block_type": ["mamba", "moe", "attention", "mlp"]}) == wanted
    assert hybrid_layers({"layers_block_type": wanted, "hybrid_override_pattern": "M"}) == wanted
    assert hybrid_layers({"num_hidden_layers": 4}) is None
    with pytest.raises(RecipeError, match="unknown kind 'X'; known: full_attention, linear_attention, mlp, moe"):
        hybrid_layers({"hybrid_override_pattern": "MX"})
    ultra, nano = hybrid_layers(packaged("nemotron_3_ultra_550b")), hybrid_layers(packaged("nemotron_3_nano_30b"))
    assert ultra is not None
    assert nano is not None
    numbers = [[kinds.count(kind) for kind in wanted] for kinds in (ultra, nano)]
    assert numbers == [[48, 48, 12, 0], [23, 23, 6, 0]]


def test_a_family_that_is_not_written_here_is_not_guessed() -> None:
    assert count_parameters({"model_type": "unheard_of"}) is None
