"""Single layers as one rank of an expert-parallel group sees them: what is computed, written and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_recipes.bench import layers
from moe_recipes.config.model_config import PACKAGED
from moe_recipes.config.resolve import load_recipe
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.moe.reference import experts_reference
from tests.tiny_models import tiny_config


def test_rows_in_a_loop_are_every_choice_once() -> None:
    """Expert i of each rank is local expert i: the sum over all choices, with every gradient."""
    torch.manual_seed(0)
    experts = moe_blocks(AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=torch.float32))[0].experts
    num_ranks, tokens, top_k = 4, 40, 5
    index = torch.rand(tokens, num_ranks * experts.num_experts).topk(top_k).indices
    x, weight = torch.randn(tokens, 64, requires_grad=True), torch.rand(tokens, top_k, requires_grad=True)
    found = layers.looped_experts(experts, x, index, weight, num_ranks=num_ranks)
    local = index % experts.num_experts
    wanted = experts_reference(x, local, weight, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    leaves, grad = [x, weight, experts.gate_up_proj, experts.down_proj], torch.randn_like(found)
    pairs = zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_rank_has_its_share_of_the_experts_and_the_whole_router() -> None:
    torch.manual_seed(0)
    model, config = layers.one_layer_of_each(load_recipe("tiny_nemotron"), ep_size=4)
    (block,) = moe_blocks(model)
    assert block.experts.num_experts == len(block.experts.up_proj) == config["n_routed_experts"] // 4
    mixer = model.get_submodule(block.name.rpartition(".")[0])
    _, _, index = mixer.gate(torch.randn(500, config["hidden_size"]))
    load = torch.bincount(index.flatten(), minlength=config["n_routed_experts"])
    assert len(load) == config["n_routed_experts"]
    assert load.min() > 0


def test_forward_flops_of_the_largest_layers() -> None:
    """From the published sizes by hand: 22 experts of 2 x 2048 x 5120, the shared one, both projections, the router."""
    config = json.loads((PACKAGED / "nemotron_3_ultra_550b" / "config.json").read_text())
    by_hand = 2 * (22 * 2 * 2048 * 5120 + 2 * 8192 * 10240 + 2 * 8192 * 2048 + 8192 * 512)
    assert layers.forward_flops(config, "moe", seq_len=4096) == by_hand
    by_hand = 2 * 8192 * 128 * (2 * 64 + 2 * 2) + 4 * 64 * 128 * 4096 / 2
    assert layers.forward_flops(config, "full_attention", seq_len=4096) == by_hand


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["layers", *words])
    return layers.main()


def test_every_kind_of_layer_is_measured(monkeypatch, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.json"
    words = ["tiny_nemotron", "--ep-size", "4", "--batches", "1,2", "--steps", "1", "--warmup", "0", "--out", str(out)]
    assert run(monkeypatch, *words) == 0
    card = json.loads(out.read_text())
    config = json.loads((PACKAGED / "tiny_nemotron_h" / "config.json").read_text())
    assert [(found["layer"], found["batch"]) for found in card["results"]] == [
        (kind, rows) for kind in ("experts", "attention", "mamba") for rows in (1, 2)
    ]
    routed = [found["rows_per_expert"] for found in card["results"] if found["layer"] == "experts"]
    one = 64 * 4 * config["num_experts_per_tok"] / config["n_routed_experts"]
    assert routed == [one, 2 * one]
    assert all(min(found["forward_backward_ms"], found["forward_ms"]) > 0 for found in card["results"])
    assert capsys.readouterr().out.count("`tiny_nemotron`") == 6
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tiny_nemotron", "--ep-size", "3"], 64, "--ep-size 3 does not divide"),
        (["tiny_nemotron", "--ep-size", "0"], 64, "--ep-size 0 does not divide"),
        (["tiny_nemotron", "--batches", "0"], 64, "--batches 0: give whole numbers from 1 on"),
        (["tiny_nemotron", "--steps", "0"], 64, "--steps 0 --warmup 3: time at least 1 step"),
        (["qwen3_30b", "--ep-size", "8"], 64, "not of 'qwen3_moe'"),
        (["tiny_nemotron", "--layers", "expert"], 64, "--layers: no layer 'expert'; did you mean 'experts'?"),
        (["tiny_nemotron", "--out", "/nowhere/x.json"], 69, "--out /nowhere/x.json: the folder is not there"),
    ],
)
def test_refused_in_one_line(monkeypatch, capsys, words, code, said) -> None:
    assert run(monkeypatch, *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
