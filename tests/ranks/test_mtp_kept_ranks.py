"""Multi-token prediction through ``from_pretrained`` on two ranks with ``ep_size`` 2: loaded and saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_export_ranks import read_folder
from tests.tiny_models import save_tiny_model


def load_and_save(source: Path, out: Path) -> None:
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    model = AutoModelForCausalLM.from_pretrained(source, distributed_config=layout)
    ids = torch.arange(48).remainder(256).view(2, 24)
    model(ids, labels=ids, use_cache=False).loss.backward()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    model.save_pretrained(out)


@pytest.mark.parametrize("family", ["deepseek_v3_mtp", "nemotron_h_mtp"])
def test_what_two_ranks_load_they_save_again(tmp_path: Path, family: str) -> None:
    run_on_ranks(save_tiny_model, 1, family, tmp_path / "source")
    run_on_ranks(load_and_save, 2, tmp_path / "source", tmp_path / "out")
    saved, source = read_folder(tmp_path / "out"), read_folder(tmp_path / "source")
    assert saved.keys() == source.keys()
    assert [key for key in source if not torch.equal(saved[key], source[key])] == []
