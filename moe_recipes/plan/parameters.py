"""How many parameters a model has and how many of them one token uses, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of scalars. ``active`` counts the embedding whole, as model cards do."""

    total: int
    active: int
    routed: int
    """Part of ``total`` that lies in routed experts."""


def count_parameters(config: Mapping[str, Any]) -> ParameterCount | None:
    """The count for a model type whose arithmetic is written here, else None.

    Args:
        config: config.json, with either spelling of the number of experts.
    """
    counter = _COUNTERS.get(str(config.get("model_type")))
    return counter(config) if counter is not None else None


def _qwen3_moe(config: Mapping[str, Any]) -> ParameterCount:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    attention = 2 * hidden * head_dim * (heads + kv_heads) + 2 * head_dim
    if config.get("attention_bias"):
        attention += head_dim * (heads + 2 * kv_heads) + hidden
    one_expert = 3 * hidden * config["moe_intermediate_size"]
    stride, dense_only = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    sparse = [i for i in range(layers) if experts and i not in dense_only and (i + 1) % stride == 0]
    dense_mlp = (layers - len(sparse)) * 3 * hidden * config["intermediate_size"]
    routed = len(sparse) * experts * one_expert
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    rest = embeddings + layers * (attention + 2 * hidden) + dense_mlp + len(sparse) * experts * hidden + hidden
    active = rest + len(sparse) * config["num_experts_per_tok"] * one_expert
    return ParameterCount(total=rest + routed, active=active, routed=routed)


_COUNTERS = {"qwen3_moe": _qwen3_moe}
