"""Runs SGLang's own model class and ``load_weights`` on an export, for models that it does not compute on a CPU.

    python -m tests.sglang_mapping RUN [--json OUT]

Builds SGLang's model of the export's config in one process, fills every parameter with NaN, hands it the export's
tensors, and says which parameters were left out and whether the values that arrived are those of the export, each as
often. Take a bfloat16 export: SGLang stores some tensors in that dtype whatever the config says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

PLACE = {"tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0, "moe_tp_rank": 0, "attn_tp_rank": 0, "attn_tp_size": 1,
         "attn_dp_rank": 0, "attn_dp_size": 1}  # fmt: skip
"""Of the only process of a group of one."""


def load(export: Path, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """SGLang's model with what its ``load_weights`` makes of the tensors; NaN where it put nothing."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(model_path=str(export), device="cpu", skip_tokenizer_init=True, disable_cuda_graph=True,
                           disable_radix_cache=True)  # fmt: skip
    set_global_server_args_for_scheduler(arguments)
    group: dict[str, Any] = {"backend": "gloo", "world_size": 1, "rank": 0, "local_rank": 0}
    init_distributed_environment(distributed_init_method="tcp://127.0.0.1:29517", **group)
    torch.set_default_dtype(torch.bfloat16)
    with get_parallel().override(**PLACE):
        initialize_model_parallel()
        initialize_dp_attention(arguments)
        config = ModelConfig.from_server_args(arguments)
        kind, _ = get_model_architecture(config)
        model = kind(config=config.hf_config)
        for tensor in model.parameters():
            tensor.data.fill_(float("nan"))
        model.load_weights(iter(tensors.items()))
    return model


def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All values in order: engines fuse, split and turn tensors. In bfloat16, which none of them goes below."""
    return torch.cat([tensor.detach().to(torch.bfloat16).flatten() for tensor in tensors]).float().sort().values


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sglang_mapping")
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    export = options.run / "export"
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(export.glob("*.safetensors")):
        tensors |= load_file(path)
    model = load(export, tensors)
    left = [name for name, tensor in model.named_parameters() if tensor.isnan().any()]
    # SGLang keeps A of a Mamba layer, of which a checkpoint has the logarithm.
    made = [-tensor.float().exp() if name.endswith(".A_log") else tensor for name, tensor in tensors.items()]
    sent, arrived = counted(made), counted(list(model.parameters()))
    report = {
        "engine": "sglang",
        "version": importlib.metadata.version("sglang"),
        "model": type(model).__name__,
        "keys": len(tensors),
        "parameters": len(list(model.parameters())),
        "not_filled": left,
        "values_sent": len(sent),
        "values_arrived": len(arrived),
        "same_values": torch.equal(arrived, sent),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if not left and report["same_values"] else 17


if __name__ == "__main__":
    sys.exit(main())
