"""Tiny runs whose exports a serving engine takes: its CPU kernels want head sizes of 32 or 64 and wide enough layers.

    python -m tests.serving_twins FOLDER [--family qwen3_moe ...] [--dtype float32 ...]

trains each twin for a few steps on two ranks with the experts spread over both and leaves ``FOLDER/FAMILY_DTYPE/run``
with its ``export`` and ``export_probe.safetensors``, by the commands that an operator types.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, NemotronHConfig, Qwen3MoeConfig

from moe_recipes.prove.weights import boost
from tests.ranks.runs import VOCAB_SIZE, train, write_task

_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "max_position_embeddings": 512}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
         "original_max_position_embeddings": 128}  # fmt: skip
NEMOTRON_LAYERS = "MEM*E"

CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON, **_HEADS, **_MOE, intermediate_size=192, num_hidden_layers=3, head_dim=32, num_experts=8,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "gpt_oss": GptOssConfig(
        **_COMMON, **_HEADS, intermediate_size=64, num_hidden_layers=4, head_dim=64, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=16, rope_parameters={**_YARN, "truncate": False},
    ),
    # vLLM's CPU kernel for latent attention knows the published 512 + 64 alone, and turns them right with YaRN alone.
    "deepseek_v3": DeepseekV3Config(
        **_COMMON, **_MOE, num_attention_heads=4, num_key_value_heads=4, intermediate_size=192, num_hidden_layers=3,
        first_k_dense_replace=1, n_shared_experts=1, q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=8, n_group=4, topk_group=2, num_nextn_predict_layers=0,
        topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1,
        rope_parameters={**_YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "nemotron_h": NemotronHConfig(
        **_COMMON, **_HEADS, **_MOE, hybrid_override_pattern=NEMOTRON_LAYERS, head_dim=32, mamba_num_heads=8,
        mamba_head_dim=32, n_groups=8, ssm_state_size=64, conv_kernel=4, chunk_size=32, intermediate_size=192,
        n_routed_experts=8, moe_shared_expert_intermediate_size=96, moe_latent_size=64, routed_scaling_factor=2.5,
        norm_topk_prob=True, n_group=1, topk_group=1,
    ),
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
FLOAT32 = ("A_log", "dt_bias", ".D", "e_score_correction_bias", "inv_freq")
"""Endings of the tensors that published bfloat16 checkpoints keep in float32."""


def publish_pattern(path: Path) -> None:
    """Name the layers as published configs do: engines have their own reading of what Transformers writes instead."""
    config = json.loads(path.read_text())
    for key in ("layers_block_type", "mtp_layers_block_type", "layer_types"):
        config.pop(key, None)
    path.write_text(json.dumps(config | {"hybrid_override_pattern": NEMOTRON_LAYERS}, indent=2) + "\n")


def make_twin(folder: Path, family: str, dtype: str) -> Path:
    """Train a twin and export it; returns the run folder. An existing ``folder`` is taken as it is."""
    run_dir = folder / "run"
    if not folder.exists():
        recipe = write_task(
            folder,
            CONFIGS[family],
            model={"dtype": dtype, "attn_implementation": "eager" if family == "gpt_oss" else "sdpa"},
            parallel={"fsdp_size": 2, "ep_size": 2},
            optim={"lr": 1e-3, "warmup_steps": 1},
            train={"steps": 4, "grad_accum_steps": 1, "activation_checkpointing": "none"},
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        boost(model)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith(FLOAT32):
                tensor.data = tensor.data.to(getattr(torch, dtype))
        model.save_pretrained(folder / "model")
        if family == "nemotron_h":
            publish_pattern(folder / "model" / "config.json")
        done = train(recipe, run_dir)
        if done.returncode != 0:
            raise SystemExit(f"{folder}: the run ended with {done.returncode}\n{done.stdout}")
    return run_dir


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.serving_twins", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    for family in options.family:
        for dtype in options.dtype:
            run_dir = make_twin(options.folder / f"{family}_{dtype}", family, dtype)
            sys.stdout.write(f"{run_dir}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
