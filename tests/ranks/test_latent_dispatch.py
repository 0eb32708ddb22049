"""What travels between ranks for Nemotron-H's latent experts: rows as wide as the latent, counted in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import one_hot
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.blocks import moe_blocks
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import save_weights

HIDDEN, LATENT, TOP_K, TOKENS, EXPERTS_PER_RANK = 64, 32, 2, 48, 4


def check_traffic(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2)
    ).train()
    layers = moe_blocks(model)
    assert (model.config.hidden_size, model.config.moe_latent_size, len(layers)) == (HIDDEN, LATENT, 2)
    chosen: list[torch.Tensor] = []
    for block in layers:
        block.router.register_forward_hook(lambda router, args, out: chosen.append(out[2]))
    sent: list[tuple[int, int, torch.dtype]] = []
    exchange = dist.all_to_all_single

    def counted(out: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_floating_point():
            sent.append((x.shape[0], x.shape[1], x.dtype))
        return exchange(out, x, *args, **kwargs)

    dist.all_to_all_single = counted
    ids = torch.arange(TOKENS).mul(37 + dist.get_rank()).remainder(256).view(2, -1)
    model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()

    bytes_of_rows = sum(rows * width * each.itemsize for rows, width, each in sent if width > TOP_K)
    assert {width for _, width, _ in sent} == {LATENT, TOP_K}  # rows, and the weights of their experts in float32
    assert {each for _, width, each in sent if width == LATENT} == {dtype}
    # One row a (token, rank), in the latent, each way, forward and backward. What comes back was sent by another rank.
    going = sum(int((one_hot(index // EXPERTS_PER_RANK, 2).sum(1) > 0).sum()) for index in chosen)
    both = torch.tensor([going, bytes_of_rows])
    dist.all_reduce(both)
    assert both[1] == 4 * both[0] * LATENT * dtype.itemsize
    assert len(chosen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_as_wide_as_the_latent(tmp_path: Path, dtype: torch.dtype) -> None:
    run_on_ranks(save_weights, 1, "nemotron_h", tmp_path)
    run_on_ranks(check_traffic, 2, tmp_path, dtype)
