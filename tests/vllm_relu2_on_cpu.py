"""``check_engines vllm`` with the one thing added that vLLM's CPU build lacks for Nemotron-H: experts without a gate.

    python -m tests.vllm_relu2_on_cpu RUN --json OUT

vLLM 0.32 refuses such experts on a CPU. Here the refusal is lifted and the two products of an expert are done by plain
torch; everything else, from reading the export to routing, Mamba, attention, latents and shared expert, is vLLM's own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from moe_recipes.models.check_engines import main

_refuses = FusedMoEConfig.__post_init__


def _accept(config: FusedMoEConfig) -> None:
    try:
        _refuses(config)
    except NotImplementedError as error:
        if "is_act_and_mul" not in str(error):
            raise


def _apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *others: Any,
    **more: Any,
) -> None:
    result = torch.zeros(output.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        up = torch.nn.functional.linear(hidden_states[token], w1[expert]).relu().square()
        down = torch.nn.functional.linear(up, w2[expert])
        result.index_add_(0, token, down.float() * topk_weights[token, slot, None].float())
    output.copy_(result)


FusedMoEConfig.__post_init__ = _accept
for _class in [CPUUnquantizedExperts, *CPUUnquantizedExperts.__subclasses__()]:
    _class._supports_no_act_and_mul = staticmethod(lambda: True)
    _class._supports_activation = staticmethod(lambda activation: activation is MoEActivation.RELU2_NO_MUL)
    _class.process_weights_after_loading = lambda self, layer: None
    _class.apply = _apply

if __name__ == "__main__":
    sys.exit(main())
