"""A model config cut down: one layer of each kind, and, where asked, widths that a CPU can train. Pure arithmetic.

The answers are ``model.config_overrides``: keys of config.json with their new values, dotted inside ``text_config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_recipes.config.errors import RecipeError
from moe_recipes.families import EXPERT_COUNT_KEYS

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_latent_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
    "n_group": 1,
    "topk_group": 1,
}
"""Largest value of a key in a narrowed model. The values fit together in every family that has several of them."""


def few_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that keep the first layer of each kind, and two layers where all are alike.

    Kinds are told apart by lists with one entry a layer, by Nemotron-H's letters, by ``per_layer_config``, and by the
    keys that say which layers have experts.

    Raises:
        RecipeError: the config does not say how many layers there are.
    """
    prefix, inner = _text_config(config)
    lists = _lists_of_layers(inner)
    counts = [key for key in LAYER_COUNT_KEYS if isinstance(inner.get(key), int)]
    if not counts and not lists:
        raise RecipeError(
            f"model_type {config.get('model_type')!r}: config.json has none of {', '.join(LAYER_COUNT_KEYS)}, so its"
            " layers cannot be cut"
        )
    number = inner[counts[0]] if counts else len(next(iter(lists.values())))
    lists = {key: value for key, value in lists.items() if len(value) == number}
    dense = [_is_dense(inner, layer) for layer in range(number)]
    own = {int(layer): keys for layer, keys in (inner.get("per_layer_config") or {}).items()}
    kinds = list(zip(dense, *lists.values(), [own.get(layer) for layer in range(number)], strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})
    if len(kept) == 1 and number > 1:
        kept = [0, 1]
    changed: dict[str, Any] = {key: len(kept) for key in counts}
    for key, value in lists.items():
        chosen = [value[layer] for layer in kept]
        changed[key] = "".join(chosen) if isinstance(value, str) else chosen
    if own:
        changed["per_layer_config"] = {str(new): own[layer] for new, layer in enumerate(kept) if layer in own}
    if isinstance(inner.get("first_k_dense_replace"), int):
        changed["first_k_dense_replace"] = sum(layer < inner["first_k_dense_replace"] for layer in kept)
    if "mlp_only_layers" in inner:
        changed["mlp_only_layers"] = [new for new, layer in enumerate(kept) if dense[layer]]
        if "decoder_sparse_step" in inner:
            changed["decoder_sparse_step"] = 1
    if inner.get("num_nextn_predict_layers"):
        changed["num_nextn_predict_layers"] = 0  # Transformers builds none; counted from the end of the true layers
    return {f"{prefix}{key}": value for key, value in changed.items()}


def narrow_widths(config: Mapping[str, Any], *, ep_size: int) -> dict[str, Any]:
    """Overrides that bring every width down to ``NARROW``, and the experts to a few on each of ``ep_size`` ranks."""
    prefix, inner = _text_config(config)
    changed: dict[str, Any] = {}
    for key, most in NARROW.items():
        value = inner.get(key)
        if isinstance(value, int) and value > most:
            changed[key] = most
    if inner.get("num_key_value_heads") == inner.get("num_attention_heads") and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed.get("num_attention_heads", inner["num_attention_heads"])
    experts_key = next((key for key in EXPERT_COUNT_KEYS if inner.get(key)), None)
    if experts_key is not None:
        experts = min(inner[experts_key], ep_size * max(2, -(-4 // ep_size)))
        changed[experts_key] = experts
        if inner.get("num_experts_per_tok"):
            changed["num_experts_per_tok"] = min(inner["num_experts_per_tok"], max(1, experts // 2))
    for key, value in inner.items():
        if key.endswith("_token_id") and _beyond(value, NARROW["vocab_size"]):
            changed[key] = 0
    return {f"{prefix}{key}": value for key, value in changed.items()}


def _text_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    inner = config.get("text_config")
    return ("text_config.", inner) if isinstance(inner, Mapping) else ("", config)


def _lists_of_layers(config: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Values with one entry a layer, by key. ``mlp_only_layers`` holds numbers of layers, ``mtp_*`` other layers."""
    found: dict[str, Sequence[Any]] = {}
    for key, value in config.items():
        named = ("layer" in key or key == "hybrid_override_pattern") and not key.startswith("mtp")
        if named and key != "mlp_only_layers" and isinstance(value, list | str) and value:
            found[key] = value
    return found


def _is_dense(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a family with experts has none, by the keys of Qwen and DeepSeek."""
    step = config.get("decoder_sparse_step") or 1
    return (
        layer < (config.get("first_k_dense_replace") or 0)
        or layer in (config.get("mlp_only_layers") or ())
        or (layer + 1) % step != 0
    )


def _beyond(value: Any, vocab_size: int) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, int) and item >= vocab_size for item in values)
