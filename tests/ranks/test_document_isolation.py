"""Another token in one document of a packed row moves no output and no gradient of another document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.packing import why_not_packed
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import EAGER_ATTENTION, relative_error, save_weights, whole_gradients

LENGTHS = (9, 14, 17)
"""Documents of each row. The second one changes; 40 tokens are more than a chunk of the tiny Mamba's scan."""

BORDERS = (0, *torch.tensor(LENGTHS).cumsum(0).tolist())
TOLERANCE = 1e-5


def logits_and_gradients(model: torch.nn.Module, ids: Tensor, read: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a sum over those of document ``read`` alone, over both ranks."""
    model.zero_grad()
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand_as(ids)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=generator)[:, BORDERS[read] : BORDERS[read + 1]]
    (logits[:, BORDERS[read] : BORDERS[read + 1]] * weights).sum().backward()
    return logits.detach(), whole_gradients(model)


def check_flip(family: str, folder: Path, ep_size: int) -> None:
    layout = DistributedConfig(fsdp_size=2, ep_size=ep_size)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=layout,
        attn_implementation="eager" if family in EAGER_ATTENTION else "sdpa",
    ).train()  # fmt: skip
    assert why_not_packed(model) is None
    ids = torch.arange(2 * 40).mul(37 + dist.get_rank()).remainder(256).view(2, 40)
    flipped = ids.clone()
    flipped[:, BORDERS[1] + 3] = (ids[:, BORDERS[1] + 3] + 100) % 256
    for read in (0, 2):
        logits, gradients = logits_and_gradients(model, ids, read)
        logits_after, gradients_after = logits_and_gradients(model, flipped, read)
        # With expert parallelism the other rank's flip counts too: both flip, and neither may be seen.
        here = slice(BORDERS[read], BORDERS[read + 1])
        assert relative_error(logits_after[:, here], logits[:, here]) < TOLERANCE
        changed = slice(BORDERS[1] + 3, BORDERS[2])
        assert relative_error(logits_after[:, changed], logits[:, changed]) > 1e-2  # or the flip shows nothing
        for name, gradient in gradients.items():
            assert relative_error(gradients_after[name], gradient) < TOLERANCE, (name, read)


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss"])
def test_a_flipped_token_moves_nothing_of_another_document(tmp_path: Path, family: str, ep_size: int) -> None:
    run_on_ranks(save_weights, 1, family, tmp_path)
    run_on_ranks(check_flip, 2, family, tmp_path, ep_size)
