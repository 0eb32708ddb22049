"""Multi-token prediction through ``from_pretrained`` on two ranks with ``ep_size`` 2: loaded and saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.distributed import DistributedConfig

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.exporting.plan import saved_tensors
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import build_run, whole
from tests.ranks.test_export_ranks import read_folder
from tests.tiny_models import mtp_tensors, save_tiny_model, tiny_config


def load_and_save(source: Path, out: Path) -> None:
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    model = AutoModelForCausalLM.from_pretrained(source, distributed_config=layout)
    ids = torch.arange(48).remainder(256).view(2, 24)
    model(ids, labels=ids, use_cache=False).loss.backward()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    model.save_pretrained(out)


def save_tied(folder: Path) -> None:
    """A DeepSeek-V3 whose output projection is its embedding, of which its MTP layer holds two copies."""
    config = tiny_config("deepseek_v3_mtp")
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | mtp_tensors("deepseek_v3_mtp")
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"model.layers.3.{name}.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_tied_in_a_run(folder: Path) -> None:
    model = build_run(folder, ep_size=2).model
    saved, source = saved_tensors(model), load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in saved
    for name in ("embed_tokens", "shared_head.head"):
        key = f"model.layers.3.{name}.weight"
        assert torch.equal(whole(saved[key]), source[key])


def test_copies_of_a_tied_output_projection(tmp_path: Path) -> None:
    run_on_ranks(save_tied, 1, tmp_path / "source")
    run_on_ranks(check_tied_in_a_run, 2, tmp_path / "source")
    run_on_ranks(load_and_save, 2, tmp_path / "source", tmp_path / "out")
    saved, source = read_folder(tmp_path / "out"), read_folder(tmp_path / "source")
    assert saved.keys() - {"lm_head.weight"} == source.keys()  # of a sharded model Transformers saves both
    assert [key for key in source if not torch.equal(saved[key], source[key])] == []


@pytest.mark.parametrize("family", ["deepseek_v3_mtp", "nemotron_h_mtp"])
def test_what_two_ranks_load_they_save_again(tmp_path: Path, family: str) -> None:
    run_on_ranks(save_tiny_model, 1, family, tmp_path / "source")
    run_on_ranks(load_and_save, 2, tmp_path / "source", tmp_path / "out")
    saved, source = read_folder(tmp_path / "out"), read_folder(tmp_path / "source")
    assert saved.keys() == source.keys()
    assert [key for key in source if not torch.equal(saved[key], source[key])] == []
