"""NVIDIA NeMo AutoModel's own benchmark recipe on the shape of one of ours; one rank of it.

A script, not a module of this package: it runs by its path, in an interpreter that has nemo_automodel and the older
Transformers that it needs, and imports nothing of ours. ``bench/automodel.py`` starts it.

The settings are those of its published figures: TransformerEngine attention, linears and norms, DeepEP, `torch_mm`
experts, FSDP2 with ``reshard_after_forward`` off, its mock data set, torch's Adam with states in the weights' dtype, no
clipping. With ``--gate balanced`` its fake router.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
import yaml

MODEL = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"
BACKENDS = {
    "te": {
        "attn": "te", "linear": "te", "rms_norm": "te", "rope_fusion": True, "experts": "torch_mm",
        "dispatcher": "deepep", "enable_fsdp_optimizations": True,
    },
    "torch": {
        "attn": "sdpa", "linear": "torch", "rms_norm": "torch", "rope_fusion": False, "experts": "torch_mm",
        "dispatcher": "torch",
    },
}  # fmt: skip


def recipe(options):
    """AutoModel's configuration as plain data."""
    num_ranks, rows, fake = int(os.environ["WORLD_SIZE"]), options.rows, options.gate == "balanced"
    return {
        "recipe": "BenchmarkingRecipeForNextTokenPrediction",
        "seed": 1234,
        "benchmark": {
            "warmup_steps": options.warmup, "peak_tflops": 989, "nsys_start": -1, "nsys_end": -1, "nsys_ranks": [],
            "num_nodes": 1,
        },
        "step_scheduler": {
            "gc_every_steps": 50, "global_batch_size": rows * num_ranks, "local_batch_size": rows,
            "ckpt_every_steps": 10**6, "val_every_steps": 10**6, "num_epochs": 1,
            "max_steps": options.warmup + options.steps,
        },
        "distributed": {
            "strategy": "fsdp2", "tp_size": 1, "cp_size": 1, "pp_size": 1, "ep_size": options.ep_size,
            "sequence_parallel": False, "activation_checkpointing": options.recompute,
            "moe": {"reshard_after_forward": False, "ignore_router_for_ac": not fake},
        },
        "dist_env": {"backend": "nccl", "timeout_minutes": 5},
        "model": {
            "_target_": MODEL,
            "config": {
                "_target_": "transformers.AutoConfig.from_pretrained",
                "pretrained_model_name_or_path": str(options.model.resolve()),
            },
            "backend": {
                "_target_": "nemo_automodel.components.models.common.BackendConfig", "fake_balanced_gate": fake,
                "enable_hf_state_dict_adapter": False, **BACKENDS[options.backend],
            },
        },
        "checkpoint": {"enabled": False},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy", "fp32_upcast": False},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock_iterable_dataset.MockIterableDataset",
            "seq_len": options.seq_len, "num_samples": 10**5,
        },
        "dataloader": {"batch_size": None, "_target_": "torch.utils.data.DataLoader", "num_workers": 0},
        "optimizer": {
            "_target_": "torch.optim.Adam", "betas": [0.9, 0.999], "eps": 1e-8, "lr": 1e-4, "weight_decay": 0,
        },
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--ep-size", type=int, required=True)
    parser.add_argument("--gate", choices=["real", "balanced"], required=True)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(options), sort_keys=False))
    # Its own parser looks at the command line too.
    import sys

    sys.argv = ["benchmark.py", "-c", str(path)]
    import nemo_automodel
    import transformers
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.recipes.llm.benchmark import BenchmarkingRecipeForNextTokenPrediction

    run = BenchmarkingRecipeForNextTokenPrediction(parse_args_and_load_config(str(path)))
    run.setup()
    run.run_benchmark()
    # Its timer adds the steps after the warm-up up: a mean, where the other arms give a median.
    step_s = run.timers._timers["iteration"].active_time() / options.steps
    if int(os.environ["RANK"]) == 0:
        result = {
            "tokens_per_s_per_gpu": options.rows * options.seq_len / step_s,
            "step_s": step_s,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "packages": {
                "nemo_automodel": nemo_automodel.__version__, "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        }  # fmt: skip
        options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
