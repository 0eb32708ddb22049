"""How many parameters a model has and how many of them one token uses, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_recipes.config.model_config import hybrid_layers


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


def _nemotron_h(config: Mapping[str, Any]) -> ParameterCount:
    """Every layer is a norm and one mixer: Mamba, attention, experts or a dense MLP. Without the layers that predict
    further tokens, which Transformers does not build."""
    hidden, kinds = config["hidden_size"], hybrid_layers(config) or []
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * hidden * config.get("head_dim", 128) * (heads + kv_heads)
    mlp_bias, bias = bool(config.get("mlp_bias")), bool(config.get("use_bias"))

    def mlp(outer: int, inner: int, *, bias: bool = mlp_bias) -> int:
        return 2 * outer * inner + (outer + inner if bias else 0)

    mamba_heads, kernel = config["mamba_num_heads"], config["conv_kernel"]
    inner = mamba_heads * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    wide = inner + channels + mamba_heads
    mamba = hidden * (wide + inner) + (wide + hidden if bias else 0)
    mamba += channels * (kernel + bool(config.get("use_conv_bias", True))) + 3 * mamba_heads + inner

    experts, latent = config["n_routed_experts"], config.get("moe_latent_size")
    one_expert = mlp(latent or hidden, config["moe_intermediate_size"], bias=False)
    router_and_shared = experts * hidden + mlp(hidden, config["moe_shared_expert_intermediate_size"])
    latent_projections = mlp(hidden, latent) if latent else 0

    sparse = kinds.count("moe")
    rest = 2 * config["vocab_size"] * hidden  # Transformers' class ties them for no config
    rest += hidden + len(kinds) * hidden + kinds.count("full_attention") * attention
    rest += kinds.count("linear_attention") * mamba + kinds.count("mlp") * mlp(hidden, config["intermediate_size"])
    rest += sparse * (router_and_shared + latent_projections)
    routed = sparse * experts * one_expert
    active = rest + sparse * config["num_experts_per_tok"] * one_expert
    return ParameterCount(total=rest + routed, active=active, routed=routed)


_COUNTERS = {"qwen3_moe": _qwen3_moe, "nemotron_h": _nemotron_h}
