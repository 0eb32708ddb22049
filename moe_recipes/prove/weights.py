"""Random weights with which every part of a model matters: a family's own initial values hide faults.

With them, whole experts could be left out, or a norm's weight be forgotten, and the loss would hardly move.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def boost(model: nn.Module, *, seed: int = 0) -> None:
    """Values that make every part of the model matter, drawn in the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if leaf == "dt_bias":
                tensor.copy_(torch.linspace(-9, 0, tensor.numel()).view_as(tensor))
            elif leaf == "A_log":
                tensor.copy_(torch.linspace(-3, 1, tensor.numel()).view_as(tensor))
            elif leaf == "D":
                tensor.copy_(0.1 + normal(tensor, 0.1))
            elif leaf == "e_score_correction_bias":
                tensor.copy_(normal(tensor, 0.1))
            elif (
                leaf == "tid2eid"
            ):  # DeepSeek-V4's table from token to experts, which is all zeros without a checkpoint
                num_experts = len(model.get_submodule(name.rpartition(".")[0]).weight)
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % num_experts)
            elif name.endswith("embed_tokens.weight") or name.endswith("embeddings.weight"):
                tensor.copy_(normal(tensor, 1.0))
            elif "norm" in name.split(".")[-2] and tensor.ndim == 1:
                tensor.copy_(1 + normal(tensor, 0.2))
            elif isinstance(tensor, nn.Parameter) and (tensor.ndim == 1 or leaf.endswith("bias")):
                tensor.copy_(normal(tensor, 0.3))
            elif isinstance(tensor, nn.Parameter):
                gain = 3.0 if "experts." in name or ".gate.weight" in name or ".router." in name else 1.0
                tensor.copy_(normal(tensor, gain / math.sqrt(tensor.shape[-1])))
