"""Training FLOPs of a token, from a config.json alone. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_recipes.config.model_config import hybrid_layers

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 peak by the vendor's datasheets, the first name that fits; the denominator of MFU."""

FORMULA = "MFU = tokens/s/GPU x 3 x (2 x active matrix parameters + 2 x heads x head_dim x seq_len x layers) / peak"
"""``layers`` are those with attention; Mamba layers add the products of their scan. Forward counts two FLOPs a weight
and token, attention half of the square; training counts the forward three times, recomputation not at all."""


def _attention(config: Mapping[str, Any], seq_len: int) -> tuple[float, float]:
    """Forward FLOPs of one layer's projections and of its causal attention, a token."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    projections = 2 * hidden * head_dim * (2 * heads + 2 * kv_heads)
    return projections, 2 * 2 * heads * head_dim * seq_len / 2


def train_flops_per_token(config: Mapping[str, Any], *, seq_len: int) -> float | None:
    """Forward plus backward FLOPs a token, or None for a family whose arithmetic is not written here.

    Args:
        config: a config.json with the keys of a declared family, or of Llama, Mistral, Qwen2 or Qwen3.
    """
    parts = _FORWARD.get(str(config.get("model_type")))
    return 3.0 * sum(parts(config, seq_len=seq_len).values()) if parts is not None else None


def _llama_forward_flops(config: Mapping[str, Any], *, seq_len: int) -> dict[str, float]:
    """Forward FLOPs a token of Llama and what is built like it, Qwen3-MoE's experts included."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    projections, attention = _attention(config, seq_len)
    dense_mlp = 3 * 2 * hidden * config["intermediate_size"]
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    if experts:
        step = config.get("decoder_sparse_step") or 1
        dense_only = set(config.get("mlp_only_layers") or [])
        sparse = sum(1 for i in range(layers) if i not in dense_only and (i + 1) % step == 0)
        sparse_mlp = config["num_experts_per_tok"] * 3 * 2 * hidden * config["moe_intermediate_size"]
        mlp = sparse * (sparse_mlp + 2 * hidden * experts) + (layers - sparse) * dense_mlp
    else:
        mlp = layers * dense_mlp
    head = 2 * hidden * config["vocab_size"]
    return {"attention": float(layers * (projections + attention)), "mlp": float(mlp), "head": float(head)}


def gpt_oss_forward_flops(config: Mapping[str, Any], *, seq_len: int) -> dict[str, float]:
    """Forward FLOPs a token of GPT-OSS, by part; a window counts as the keys that it lets a token see on average."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    projections, attention = _attention(config, seq_len)
    window = min(config.get("sliding_window") or seq_len, seq_len)
    inside = (window - window * window / (2 * seq_len)) / (seq_len / 2)
    kinds = config.get("layer_types")
    windowed = kinds.count("sliding_attention") if kinds else (layers + 1) // 2
    return {
        "attention projections": float(layers * projections),
        "attention": attention * (layers - windowed + windowed * inside),
        "router": float(layers * 2 * hidden * config["num_local_experts"]),
        "routed experts": float(layers * config["num_experts_per_tok"] * 3 * 2 * hidden * inner),
        "head": float(2 * hidden * config["vocab_size"]),
    }


def deepseek_v3_forward_flops(config: Mapping[str, Any], *, seq_len: int) -> dict[str, float]:
    """Forward FLOPs a token of DeepSeek-V3, by part. Layers that predict further tokens are not among them."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    q_latent, kv_latent = config.get("q_lora_rank"), config["kv_lora_rank"]
    wide = heads * (nope + rope)
    queries = q_latent * (hidden + wide) if q_latent else hidden * wide
    projections = queries + hidden * (kv_latent + rope) + kv_latent * heads * (nope + value) + heads * value * hidden
    dense = min(layers, config.get("first_k_dense_replace") or 0)
    sparse, expert = layers - dense, 3 * 2 * hidden * config["moe_intermediate_size"]
    return {
        "attention projections": float(layers * 2 * projections),
        "attention": layers * 2 * heads * (nope + rope + value) * seq_len / 2,
        "router": float(sparse * 2 * hidden * config["n_routed_experts"]),
        "routed experts": float(sparse * config["num_experts_per_tok"] * expert),
        "shared expert": float(sparse * config["n_shared_experts"] * expert),
        "dense MLP": float(dense * 3 * 2 * hidden * config["intermediate_size"]),
        "head": float(2 * hidden * config["vocab_size"]),
    }


def nemotron_h_forward_flops(config: Mapping[str, Any], *, seq_len: int) -> dict[str, float]:
    """Forward FLOPs a token of Nemotron-H, by part. Layers that predict further tokens are not among them."""
    kinds, hidden = hybrid_layers(config) or [], config["hidden_size"]
    projections, attention = _attention(config, seq_len)
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    states = config["n_groups"] * config["ssm_state_size"]
    wide = 2 * inner + 2 * states + config["mamba_num_heads"]
    # The scan in chunks: C x B and its product with x inside a chunk, then B x x and C x state between chunks.
    scan = 2 * config["chunk_size"] * (states + inner) + 2 * 2 * inner * config["ssm_state_size"]
    latent = config.get("moe_latent_size")
    expert = 2 * 2 * (latent or hidden) * config["moe_intermediate_size"]
    mamba, sparse, dense = (kinds.count(kind) for kind in ("linear_attention", "moe", "mlp"))
    return {
        "attention projections": kinds.count("full_attention") * projections,
        "attention": kinds.count("full_attention") * attention,
        "mamba projections": float(mamba * 2 * hidden * (wide + inner)),
        "mamba scan": float(mamba * scan),
        "router": float(sparse * 2 * hidden * config["n_routed_experts"]),
        "routed experts": float(sparse * config["num_experts_per_tok"] * expert),
        "shared expert": float(sparse * 2 * 2 * hidden * config["moe_shared_expert_intermediate_size"]),
        "latent projections": float(sparse * 2 * 2 * hidden * latent if latent else 0),
        "dense MLP": float(dense * 2 * 2 * hidden * config["intermediate_size"]),
        "head": float(2 * hidden * config["vocab_size"]),
    }


_FORWARD = {
    **dict.fromkeys(("qwen3_moe", "qwen3", "llama", "mistral", "qwen2"), _llama_forward_flops),
    "nemotron_h": nemotron_h_forward_flops,
    "gpt_oss": gpt_oss_forward_flops,
    "deepseek_v3": deepseek_v3_forward_flops,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by its name, FLOP/s; None if it is not in the table."""
    for key, peak in PEAK_FLOPS.items():
        if key in device_name:
            return peak
    return None
