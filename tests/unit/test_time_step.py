"""Mamba's time step is limited as the config says, beside Transformers with that limit set by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.time_step import honour_time_step_limit
from tests.ranks.parity import boost
from tests.tiny_models import tiny_config

IDS = torch.arange(48).mul(37).remainder(256).view(2, 24)


def saved(folder: Path, limit: tuple[float, float]) -> Path:
    config = tiny_config("nemotron_h")
    config.time_step_limit = list(limit)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    boost(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.0, 0.05), (0.01, 0.02)])
def test_logits_are_those_of_the_limit_in_the_config(tmp_path: Path, limit: tuple[float, float]) -> None:
    folder = saved(tmp_path / "model", limit)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    clamped = logits(plain)
    mixers = [m for m in plain.modules() if type(m).__name__ == "NemotronHMamba2Mixer"]
    assert mixers
    for mixer in mixers:
        mixer.time_step_limit = limit
    reference = logits(plain)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert float((logits(model) - reference).abs().max()) < 2e-5
    assert float((clamped - reference).abs().max()) > 2e-4  # the limit matters, or this test shows nothing
    said = {o.name: o for o in model.moe_recipes_optimizations}["time-step limit of the config"]
    assert (said.applied, said.reason) == (True, f"{len(mixers)} Mamba layers")


def test_a_model_that_honours_its_limit_is_left_alone() -> None:
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert any(hasattr(module, "time_step_limit") for module in model.modules())
    assert honour_time_step_limit(model) is None
    assert honour_time_step_limit(torch.nn.Linear(2, 2)) is None
