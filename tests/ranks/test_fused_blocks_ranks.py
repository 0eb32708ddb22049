"""Fused blocks of a sharded model: FSDP2's own class in front, and recomputation that still happens.

That their values are Transformers' own on every layout is what ``test_parity_layouts.py`` holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

from moe_recipes.models.fused import attention as fused_attention
from moe_recipes.models.fused import residual as fused_residual
from moe_recipes.train.loop import forward_backward
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import NUM_MICROBATCHES, build_run, rank_batches, save_weights


def counted(calls: Counter, module: Any, name: str) -> None:
    function: Callable[..., Any] = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    setattr(module, name, call)


def check(folder: Path, ep_size: int, checkpointing: str) -> None:
    calls: Counter = Counter()
    counted(calls, fused_attention, "qk_norm_rope")
    counted(calls, fused_residual, "add_rms_norm")
    run = build_run(folder, ep_size=ep_size, checkpointing=checkpointing)
    layers = run.model.model.layers
    for layer in layers:
        assert type(layer).__name__ == "FSDPQwen3MoeDecoderLayer"
        assert isinstance(layer, FSDPModule)
        assert isinstance(layer, fused_residual.Qwen3MoeDecoderLayer)
        assert type(layer.self_attn) is fused_attention.Qwen3MoeAttention
    assert type(layers[0]) is type(layers[1])
    forward_backward(run, rank_batches("qwen3_moe"), num_label_tokens=100.0)
    times = NUM_MICROBATCHES * len(layers) * (2 if checkpointing == "full" else 1)
    assert calls == {"qk_norm_rope": times, "add_rms_norm": times}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_sharded_blocks_are_fused(tmp_path, checkpointing):
    run_on_ranks(save_weights, 1, "qwen3_moe", tmp_path)
    run_on_ranks(check, 2, tmp_path, 2, checkpointing)
