"""FLOPs of a token from a config alone: against matrix products counted by torch, and against published totals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from moe_recipes.config.model_config import PACKAGED
from moe_recipes.plan.flops import (
    deepseek_v3_forward_flops,
    gpt_oss_forward_flops,
    nemotron_h_forward_flops,
    peak_flops,
    train_flops_per_token,
)

SEQ_LEN = 64
NOT_COUNTED_ALIKE = ("attention", "mamba scan")
"""Torch counts the whole square of attention, and Transformers' scan on the CPU is not one of matrix products alone."""


def packaged(name: str) -> dict[str, Any]:
    return json.loads((PACKAGED / name / "config.json").read_bytes())


def counted_by_torch(config: dict[str, Any]) -> dict[str, float]:
    """Forward FLOPs a token of each Linear of Transformers' model, and of its experts, by the name of its class."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(SEQ_LEN)[None] % config["vocab_size"], use_cache=False)
    found: dict[str, float] = {}
    counts = counter.get_flop_counts()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear" or kind.endswith(("Experts", "NaiveMoe", "TopkRouter", "TopKRouter")):
            key = "lm_head" if name == "lm_head" else name.split(".", 3)[-1]
            found[key] = found.get(key, 0.0) + sum(counts[f"{type(model).__name__}.{name}"].values()) / SEQ_LEN
    return found


@pytest.mark.parametrize("changes", [{}, {"moe_latent_size": None}, {"hybrid_override_pattern": "M-*E*-M"}])
def test_every_matrix_product_of_nemotron_h_is_counted(changes: dict[str, Any]) -> None:
    config = {**packaged("tiny_nemotron_h"), **changes}
    parts = nemotron_h_forward_flops(config, seq_len=SEQ_LEN)
    torch_parts = counted_by_torch(config)
    ours = sum(flops for name, flops in parts.items() if name not in NOT_COUNTED_ALIKE)
    assert ours == pytest.approx(sum(torch_parts.values()), rel=1e-12)
    assert parts["mamba projections"] == sum(torch_parts[f"mixer.{name}_proj"] for name in ("in", "out"))
    assert parts["routed experts"] == torch_parts["mixer.experts"]


@pytest.mark.parametrize(
    ("name", "parts_of", "changes"),
    [
        ("tiny_deepseek_v3", deepseek_v3_forward_flops, {}),
        ("tiny_deepseek_v3", deepseek_v3_forward_flops, {"q_lora_rank": None, "first_k_dense_replace": 2}),
        ("tiny_gpt_oss", gpt_oss_forward_flops, {}),
        ("tiny_gpt_oss", gpt_oss_forward_flops, {"num_experts_per_tok": 3, "head_dim": 8}),
    ],
)
def test_every_matrix_product_of_deepseek_and_gpt_oss_is_counted(
    name: str, parts_of: Callable[..., dict[str, float]], changes: dict[str, Any]
) -> None:
    config = {**packaged(name), **changes}
    parts = parts_of(config, seq_len=SEQ_LEN)
    ours = sum(flops for part, flops in parts.items() if part not in NOT_COUNTED_ALIKE)
    assert ours == pytest.approx(sum(counted_by_torch(config).values()), rel=1e-12)
    assert train_flops_per_token(config, seq_len=SEQ_LEN) == 3 * sum(parts.values())


def test_attention_counts_the_keys_that_a_token_sees() -> None:
    """Against a sum over tokens, each of which sees half of itself, as where the square is counted half."""
    config = packaged("tiny_gpt_oss")
    visible = {
        kind: sum(min(token + 0.5, window) if window else token + 0.5 for token in range(SEQ_LEN)) / SEQ_LEN
        for kind, window in (("full_attention", None), ("sliding_attention", config["sliding_window"]))
    }
    keys = sum(visible[kind] for kind in config["layer_types"])
    wanted = keys * 2 * 2 * config["num_attention_heads"] * config["head_dim"]
    assert gpt_oss_forward_flops(config, seq_len=SEQ_LEN)["attention"] == pytest.approx(wanted, rel=0.02)
    without = {key: value for key, value in config.items() if key != "layer_types"}
    assert gpt_oss_forward_flops(without, seq_len=SEQ_LEN) == gpt_oss_forward_flops(config, seq_len=SEQ_LEN)
    wide = gpt_oss_forward_flops({**config, "sliding_window": 4096}, seq_len=SEQ_LEN)["attention"]
    assert wide == len(config["layer_types"]) * 2 * 2 * config["num_attention_heads"] * config["head_dim"] * SEQ_LEN / 2
    deep = packaged("tiny_deepseek_v3")
    heads, size = deep["num_attention_heads"], deep["qk_nope_head_dim"] + deep["qk_rope_head_dim"] + deep["v_head_dim"]
    counted = deepseek_v3_forward_flops(deep, seq_len=SEQ_LEN)["attention"]
    assert counted == deep["num_hidden_layers"] * heads * size * SEQ_LEN


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nemotron_3_nano_30b", "6.73"),
        ("nemotron_3_super_120b", "24.99"),
        ("nemotron_3_ultra_550b", "111.38"),
        ("qwen3_30b_a3b", "7.69"),
        ("qwen3_235b_a22b", "49.44"),
        ("gpt_oss_20b", "7.64"),
        ("gpt_oss_120b", "10.90"),
        ("deepseek_v3", "83.48"),
    ],
)
def test_totals_of_the_published_models(name: str, wanted: str) -> None:
    flops = train_flops_per_token(packaged(name), seq_len=4096)
    assert flops is not None
    assert f"{flops / 3e9:.2f}" == wanted  # GFLOP a token, forward


def test_attention_and_scan_grow_as_they_should() -> None:
    config = packaged("nemotron_3_nano_30b")
    short, long = (nemotron_h_forward_flops(config, seq_len=n) for n in (1024, 4096))
    assert long["attention"] == 4 * short["attention"]
    assert {name for name in short if short[name] != long[name]} == {"attention"}
    chunks = nemotron_h_forward_flops({**config, "chunk_size": 256}, seq_len=1024)
    assert {name for name in short if short[name] != chunks[name]} == {"mamba scan"}
    inner, states, layers = 64 * 64, 8 * 128, 23
    assert chunks["mamba scan"] - short["mamba scan"] == layers * 2 * 128 * (inner + states)


def test_what_is_not_known_is_not_guessed() -> None:
    assert train_flops_per_token({"model_type": "unheard_of"}, seq_len=8) is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert peak_flops("CPU") is None
