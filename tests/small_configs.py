"""Every config class of the installed Transformers that has an expert-parallel plan, cut down to what a CPU computes in
a second.

The cuts are those of ``moe-recipes prove``; what a class leaves open, or what must fit together in a way that only this
family has, stands in ``OPEN``.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from moe_recipes.launch.prove import small_config

_GEMMA4 = {
    "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32,
}  # fmt: skip
_QWEN4_EXP = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_INKLING2 = {
    "unpadded_vocab_size": 500, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "d_rel": 8, "rel_extent": 16, "sliding_window_size": 8, "n_layers_per_attn_res_block": 1,
}  # fmt: skip
OPEN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 4, "topk_group": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config.head_dim": 48, "vision_config.adapter_out_dim": 64, "audio_config.adapter_out_dim": 64},
    "dots3_note_text": {"head_dim": 48},
    "flex_olmo": {"num_experts": 8},
    "gemma4": {f"text_config.{key}": value for key, value in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "inkling2_loop_text": {**_INKLING2, "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_gate_rank": 8},
    "inkling2_text": _INKLING2,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2_moe": {
        "num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
    },
    "phimoe": {"router_jitter_noise": 0.0},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _QWEN4_EXP.items()},
    "qwen4_exp_text": _QWEN4_EXP,
}  # fmt: skip


def plan_bearing() -> list[str]:
    """Model types whose config, or whose text part, has an expert-parallel plan; in Transformers' order."""
    found = []
    for model_type in CONFIG_MAPPING_NAMES:
        kind = CONFIG_MAPPING[model_type]
        parts = [kind, *(getattr(kind, "sub_configs", None) or {}).values()]
        if any(getattr(part, "base_model_ep_plan", None) for part in parts):
            found.append(model_type)
    return found


def small(model_type: str) -> PreTrainedConfig:
    """The class's own defaults with few layers of each kind, narrow, 8 experts with 2 a token where it lets that be.

    Raises: whatever the config class raises for values that do not fit together.
    """
    config = CONFIG_MAPPING[model_type]().to_dict()
    for key, value in {**small_config(config), **OPEN.get(model_type, {})}.items():
        *path, leaf = key.split(".")
        place = config
        for name in path:
            place = place[name]
        place[leaf] = value
    config.pop("model_type", None)
    return AutoConfig.for_model(model_type, **config)
