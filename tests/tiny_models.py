"""Tiny models of each family with random values everywhere: initial values that are zero or equal hide faults."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

_COMMON = {"vocab_size": 256, "hidden_size": 64, "max_position_embeddings": 512, "num_attention_heads": 4}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


def tiny_config(family: str) -> PreTrainedConfig:
    """Eight experts where there are any; sizes are small but differ from each other."""
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **_COMMON, **_MOE, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2, head_dim=16,
            num_experts=8, norm_topk_prob=True, tie_word_embeddings=False,
        )  # fmt: skip
    if family == "deepseek_v3":
        return DeepseekV3Config(
            **_COMMON, **_MOE, intermediate_size=96, num_hidden_layers=3, first_k_dense_replace=1, n_shared_experts=1,
            num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
            v_head_dim=16, n_routed_experts=8, n_group=4, topk_group=2, num_nextn_predict_layers=0,
        )  # fmt: skip
    if family == "nemotron_h":
        return NemotronHConfig(
            **_COMMON, **_MOE, hybrid_override_pattern="MEM*E-", num_key_value_heads=2, head_dim=16, mamba_num_heads=8,
            mamba_head_dim=16, n_groups=2, ssm_state_size=16, conv_kernel=4, chunk_size=32, intermediate_size=96,
            n_routed_experts=8, moe_shared_expert_intermediate_size=80, moe_latent_size=32,
            routed_scaling_factor=2.5, norm_topk_prob=True, n_group=1, topk_group=1,
        )  # fmt: skip
    if family == "gpt_oss":
        return GptOssConfig(
            **_COMMON, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, head_dim=16,
            num_local_experts=8, num_experts_per_tok=2, sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
        )  # fmt: skip
    if family in ("llama", "llama_tied"):
        return LlamaConfig(
            **_COMMON, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2,
            tie_word_embeddings=family == "llama_tied",
        )  # fmt: skip
    raise ValueError(family)


def save_tiny_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Save a model of random normal values with Transformers' ``save_pretrained``, in one process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder)
