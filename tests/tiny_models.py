"""Tiny models of each family with random values everywhere: initial values that are zero or equal hide faults."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
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
    """Eight experts where there are any; sizes are small but differ from each other. ``FAMILY_mtp`` predicts further
    tokens, which Transformers' model of the config does not."""
    if family.endswith("_mtp"):
        config = tiny_config(family.removesuffix("_mtp"))
        config.num_nextn_predict_layers = 1
        return config
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


def _mtp_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Tensors of the MTP layers by the names of the published checkpoints; what is shared with the model left out."""
    hidden, experts = 64, range(8)
    if family == "deepseek_v3_mtp":
        at = "model.layers.3."
        shapes = {
            **dict.fromkeys([f"{at}{n}.weight" for n in ("enorm", "hnorm", "shared_head.norm")], (hidden,)),
            **dict.fromkeys([f"{at}{n}_layernorm.weight" for n in ("input", "post_attention")], (hidden,)),
            f"{at}eh_proj.weight": (hidden, 2 * hidden),
            f"{at}self_attn.q_a_proj.weight": (32, hidden),
            f"{at}self_attn.q_a_layernorm.weight": (32,),
            f"{at}self_attn.q_b_proj.weight": (4 * 32, 32),
            f"{at}self_attn.kv_a_proj_with_mqa.weight": (32 + 16, hidden),
            f"{at}self_attn.kv_a_layernorm.weight": (32,),
            f"{at}self_attn.kv_b_proj.weight": (4 * 32, 32),
            f"{at}self_attn.o_proj.weight": (hidden, 4 * 16),
            f"{at}mlp.gate.weight": (8, hidden),
            f"{at}mlp.gate.e_score_correction_bias": (8,),
        }
        mlps = [f"{at}mlp.experts.{e}." for e in experts] + [f"{at}mlp.shared_experts."]
        for mlp in mlps:
            shapes |= {f"{mlp}{n}_proj.weight": (48, hidden) for n in ("gate", "up")}
            shapes[f"{mlp}down_proj.weight"] = (hidden, 48)
        return shapes
    at = "mtp.layers.0."
    shapes = {
        **dict.fromkeys([f"{at}{n}.weight" for n in ("enorm", "hnorm", "norm")], (hidden,)),
        f"{at}eh_proj.weight": (hidden, 2 * hidden),
        f"{at}mixer.q_proj.weight": (4 * 16, hidden),
        f"{at}mixer.k_proj.weight": (2 * 16, hidden),
        f"{at}mixer.v_proj.weight": (2 * 16, hidden),
        f"{at}mixer.o_proj.weight": (hidden, 4 * 16),
    }
    at = "mtp.layers.1."
    shapes |= dict.fromkeys([f"{at}{n}.weight" for n in ("norm", "final_layernorm")], (hidden,))
    shapes |= {f"{at}mixer.gate.weight": (8, hidden), f"{at}mixer.gate.e_score_correction_bias": (8,)}
    shapes |= {f"{at}mixer.fc1_latent_proj.weight": (32, hidden), f"{at}mixer.fc2_latent_proj.weight": (hidden, 32)}
    shapes |= {f"{at}mixer.shared_experts.up_proj.weight": (80, hidden)}
    shapes |= {f"{at}mixer.shared_experts.down_proj.weight": (hidden, 80)}
    for e in experts:
        shapes |= {
            f"{at}mixer.experts.{e}.up_proj.weight": (48, 32),
            f"{at}mixer.experts.{e}.down_proj.weight": (32, 48),
        }
    return shapes


def mtp_tensors(family: str, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values that make every part of the MTP layers matter; router weights and biases in float32."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in _mtp_shapes(family).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensor = values * 0.1 if name.endswith("bias") else 1 + 0.2 * values
        else:
            gain = 3.0 if "experts." in name or ".gate." in name else 1.0
            tensor = values * gain / shape[-1] ** 0.5
        tensors[name] = tensor if ".gate." in name else tensor.to(dtype)
    return tensors


def add_mtp(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Put the MTP layers into a saved model's file; for DeepSeek-V3 with the copies that its checkpoint holds."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | mtp_tensors(family, dtype=dtype)
    if family == "deepseek_v3_mtp":
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def save_tiny_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Save a model of random normal values with Transformers' ``save_pretrained``, in one process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder)
    if family.endswith("_mtp"):
        add_mtp(family, folder, dtype=dtype)
