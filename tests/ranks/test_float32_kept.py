"""What a family keeps in float32 is float32 where it is used, also under FSDP2's mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.blocks import moe_blocks
from tests.ranks.launch import run_on_ranks
from tests.tiny_models import save_tiny_model


def check_router_weights(folder: Path, ep_size: int) -> None:
    layout = DistributedConfig(fsdp_size=2, ep_size=ep_size, fsdp_mixed_precision=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=layout)
    file = load_file(folder / "model.safetensors")
    stored = [weight for name, weight in file.items() if name.endswith(".gate.weight")]
    used: list[torch.Tensor] = []

    def remember(router: torch.nn.Module, args: object) -> None:
        used.append(router.weight.detach().clone())

    routers = [block.router for block in moe_blocks(model)]
    for router in routers:
        router.register_forward_pre_hook(remember)
    ids = torch.arange(16).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()

    assert len(used) == len(stored) == len(routers) > 0
    for weight in used:
        assert weight.dtype == torch.float32
        assert any(torch.equal(weight, value) for value in stored)
        assert not torch.equal(weight, weight.bfloat16().float())
    assert all(router.weight.grad.dtype == torch.float32 for router in routers)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_router_weights_are_not_rounded(tmp_path: Path, family: str, ep_size: int) -> None:
    run_on_ranks(save_tiny_model, 1, family, tmp_path)
    run_on_ranks(check_router_weights, 2, tmp_path, ep_size)
