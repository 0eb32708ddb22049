"""Which norms are fused, and that a fused norm on the CPU computes what Transformers does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_recipes.kernels.rms_norm import rms_norm_reference
from moe_recipes.models.fused.norms import fuse_norms, is_standard
from tests.tiny_models import tiny_config


def tiny(family: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_every_norm_of_these_families_is_replaced(family):
    norms = [m for m in tiny(family).modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    assert {is_standard(norm) for norm in norms} == {True}


def test_only_the_known_source_is_replaced():
    class OtherRMSNorm(type(tiny("llama").model.norm)):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * super().forward(hidden_states)

    assert not is_standard(OtherRMSNorm(8))


@pytest.mark.parametrize(
    ("family", "rounds_first"), [("qwen3_moe", True), ("deepseek_v3", True), ("gpt_oss", False), ("nemotron_h", False)]
)
def test_reference_is_transformers_own(family, rounds_first):
    base = tiny(family).base_model
    norm = base.norm_f if family == "nemotron_h" else base.norm
    torch.nn.init.normal_(norm.weight)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, norm.weight.shape[0], dtype=dtype)
        norm.to(dtype)
        found = rms_norm_reference(x, norm.weight, norm.variance_epsilon, rounds_first=rounds_first)
        assert torch.equal(found, norm(x))
        other = rms_norm_reference(x, norm.weight, norm.variance_epsilon, rounds_first=not rounds_first)
        assert dtype == torch.float32 or not torch.equal(other, norm(x))


def test_copies_and_pickles_use_their_own_weight():
    model = tiny("qwen3_moe")
    fuse_norms(model)
    x = torch.ones(1, model.model.norm.weight.shape[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = model.model.norm(x)
        torch.nn.init.constant_(twin.model.norm.weight, 7.0)
        assert torch.equal(model.model.norm(x), before)
        assert not torch.equal(twin.model.norm(x), before)
