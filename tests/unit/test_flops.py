"""FLOPs of a token from a config alone: against matrix products counted by torch, and against published totals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from moe_recipes.config.model_config import PACKAGED
from moe_recipes.plan.flops import nemotron_h_forward_flops, peak_flops, train_flops_per_token

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
        if kind in ("Linear", "NemotronHExperts", "NemotronHTopkRouter"):
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
    ("name", "wanted"),
    [("nemotron_3_nano_30b", "6.73"), ("nemotron_3_ultra_550b", "111.38"), ("qwen3_30b_a3b", "7.69")],
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
    assert peak_flops("CPU") is None
