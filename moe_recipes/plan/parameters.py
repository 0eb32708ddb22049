"""How many parameters a model has and how many of them one token uses, from its config.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_recipes.config.model_config import hybrid_layers
from moe_recipes.families import Mtp, family_of


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of scalars, those of Transformers' model. ``active`` counts the embedding whole."""

    total: int
    active: int
    routed: int
    """Part of ``total`` that lies in routed experts."""

    mtp: int = 0
    """Beside ``total``: the layers that predict further tokens, which Transformers does not build and the trainer does.
    What they repeat of the model is not counted."""

    @property
    def trained(self) -> int:
        """All that the trainer holds, saves and exports."""
        return self.total + self.mtp


def count_parameters(config: Mapping[str, Any]) -> ParameterCount | None:
    """The count for a model type whose arithmetic is written here, else None.

    Args:
        config: config.json, with either spelling of the number of experts.
    """
    family = family_of(config)
    return None if family is None else _COUNTERS[family.name](config, family.mtp)


def _qwen3_moe(config: Mapping[str, Any], _: Mtp | None) -> ParameterCount:
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


def _gpt_oss(config: Mapping[str, Any], _: Mtp | None) -> ParameterCount:
    """Every matrix but the embedding and the output projection has a bias; every head has one more number, its sink."""
    hidden, layers, head_dim = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    experts, inner = config["num_local_experts"], config["intermediate_size"]
    attention = 2 * hidden * head_dim * (heads + kv_heads) + heads
    if config.get("attention_bias", True):
        attention += head_dim * (heads + 2 * kv_heads) + hidden
    one_expert = 3 * hidden * inner + 2 * inner + hidden
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    rest = embeddings + hidden + layers * (attention + 2 * hidden + experts * (hidden + 1))
    routed = layers * experts * one_expert
    active = rest + layers * config["num_experts_per_tok"] * one_expert
    return ParameterCount(total=rest + routed, active=active, routed=routed)


def _deepseek_v3(config: Mapping[str, Any], mtp: Mtp | None) -> ParameterCount:
    """Attention through latents: queries, and keys with values, are projected down, normed, and up again."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    q_latent, kv_latent, bias = config.get("q_lora_rank"), config["kv_lora_rank"], bool(config.get("attention_bias"))
    attention = hidden * (kv_latent + rope) + kv_latent + kv_latent * heads * (nope + value) + heads * value * hidden
    attention += (kv_latent + rope + hidden) if bias else 0
    if q_latent:
        attention += hidden * q_latent + q_latent + q_latent * heads * (nope + rope) + (q_latent if bias else 0)
    else:
        attention += hidden * heads * (nope + rope)
    one_expert = 3 * hidden * config["moe_intermediate_size"]
    experts, dense = config["n_routed_experts"], min(layers, config.get("first_k_dense_replace") or 0)
    around = experts * hidden + config["n_shared_experts"] * one_expert
    norms = 2 * hidden
    rest = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2) + hidden
    rest += layers * (attention + norms) + dense * 3 * hidden * config["intermediate_size"] + (layers - dense) * around
    routed = (layers - dense) * experts * one_expert
    active = rest + (layers - dense) * config["num_experts_per_tok"] * one_expert
    blocks = mtp.num_blocks(config) if mtp is not None else 0
    one_block = attention + norms + around + experts * one_expert + _fusion(hidden) + hidden
    return ParameterCount(total=rest + routed, active=active, routed=routed, mtp=blocks * one_block)


def _fusion(hidden: int) -> int:
    """What brings the hidden state and the next token's embedding together: two norms and a projection."""
    return 2 * hidden + 2 * hidden * hidden


def _nemotron_h(config: Mapping[str, Any], mtp: Mtp | None) -> ParameterCount:
    """Every layer is a norm and one mixer: Mamba, attention, experts or a dense MLP."""
    hidden, kinds = config["hidden_size"], hybrid_layers(config) or []
    experts = config["n_routed_experts"]
    one_expert = _mlp(config.get("moe_latent_size") or hidden, config["moe_intermediate_size"], bias=False)
    sizes = _nemotron_h_layers(config)
    rest = 2 * config["vocab_size"] * hidden + hidden  # Transformers' class ties them for no config
    rest += sum(hidden + sizes[kind] for kind in kinds)
    sparse = kinds.count("moe")
    routed = sparse * experts * one_expert
    active = rest + sparse * config["num_experts_per_tok"] * one_expert
    extra = 0
    if mtp is not None and (blocks := mtp.num_blocks(config)):
        block = hybrid_layers({"layers_block_type": mtp.layers_of_block(config)}) or []
        one_block = sum(hidden + sizes[kind] for kind in block) + block.count("moe") * experts * one_expert
        extra = blocks * (one_block + _fusion(hidden) + hidden)
    return ParameterCount(total=rest + routed, active=active, routed=routed, mtp=extra)


def _nemotron_h_layers(config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a mixer of each kind, routed experts left out."""
    hidden, latent = config["hidden_size"], config.get("moe_latent_size")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    mlp_bias, bias = bool(config.get("mlp_bias")), bool(config.get("use_bias"))
    mamba_heads, kernel = config["mamba_num_heads"], config["conv_kernel"]
    inner = mamba_heads * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    wide = inner + channels + mamba_heads
    mamba = hidden * (wide + inner) + (wide + hidden if bias else 0)
    mamba += channels * (kernel + bool(config.get("use_conv_bias", True))) + 3 * mamba_heads + inner
    around = config["n_routed_experts"] * hidden
    around += _mlp(hidden, config["moe_shared_expert_intermediate_size"], bias=mlp_bias)
    around += _mlp(hidden, latent, bias=mlp_bias) if latent else 0
    return {
        "full_attention": 2 * hidden * config.get("head_dim", 128) * (heads + kv_heads),
        "linear_attention": mamba,
        "mlp": _mlp(hidden, config["intermediate_size"], bias=mlp_bias),
        "moe": around,
    }


def _mlp(outer: int, inner: int, *, bias: bool) -> int:
    return 2 * outer * inner + (outer + inner if bias else 0)


_COUNTERS: Mapping[str, Callable[[Mapping[str, Any], Mtp | None], ParameterCount]] = {
    "qwen3_moe": _qwen3_moe,
    "nemotron_h": _nemotron_h,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}
