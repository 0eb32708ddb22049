"""Dense MLPs and shared experts with a fused activation: Nemotron-H's ``relu2``, DeepSeek-V3's ``silu(gate) * up``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ReLUSquaredActivation
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h

from moe_recipes.kernels.relu2 import relu2
from moe_recipes.kernels.swiglu import swiglu_pair
from moe_recipes.models.blocks import fingerprint, fuse_class, modules_of_class
from moe_recipes.runtime.optimizations import Optimization

NAME = "fused activation of dense MLPs"
REPLACED = {"NemotronHMLP": "abf109b39f4418d2", "DeepseekV3MLP": "d9e9fc4111026fc2"}
"""Fingerprints of what the forwards below stand for."""


def found_sources() -> dict[str, str]:
    """Fingerprints of the same functions in the installed Transformers."""
    return {
        "NemotronHMLP": fingerprint(nemotron_h.NemotronHMLP.forward, ReLUSquaredActivation.forward),
        "DeepseekV3MLP": fingerprint(deepseek_v3.DeepseekV3MLP.forward),
    }


class NemotronHMLP(nemotron_h.NemotronHMLP):
    """Parameters, name and results of Transformers' class; only its forward is another."""

    def forward(self, x: Tensor) -> Tensor:
        """As Transformers' own, which computes while ``torch.compile`` traces and with another activation."""
        if torch.compiler.is_compiling() or type(self.act_fn) is not ReLUSquaredActivation:
            return super().forward(x)
        return self.down_proj(relu2(self.up_proj(x)))


class DeepseekV3MLP(deepseek_v3.DeepseekV3MLP):
    """Parameters, name and results of Transformers' class; only its forward is another."""

    def forward(self, x: Tensor) -> Tensor:
        """As Transformers' own, which computes while ``torch.compile`` traces and with another activation."""
        silu = isinstance(self.act_fn, nn.SiLU) or type(self.act_fn).__name__ == "SiLUActivation"
        if torch.compiler.is_compiling() or not silu:
            return super().forward(x)
        return self.down_proj(swiglu_pair(self.gate_proj(x), self.up_proj(x)))


def fuse_mlps(model: nn.Module) -> Optimization | None:
    """Give every dense MLP of these families the fused forward; None where the model has none."""
    sources = found_sources()
    pairs = ((nemotron_h.NemotronHMLP, NemotronHMLP), (deepseek_v3.DeepseekV3MLP, DeepseekV3MLP))
    for theirs, ours in pairs:
        if modules_of_class(model, theirs):
            kind = theirs.__name__
            return fuse_class(model, theirs, ours, name=NAME, source=sources[kind], replaced=REPLACED[kind])
    return None
