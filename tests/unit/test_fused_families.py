"""Attention of DeepSeek-V3 and GPT-OSS, and dense MLPs, with fused forwards: the values of Transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers

from moe_recipes.models.blocks import modules_of_class
from moe_recipes.models.fused import gpt_oss as fused_gpt_oss
from moe_recipes.models.fused import mla as fused_mla
from moe_recipes.models.fused import mlp as fused_mlp
from moe_recipes.runtime.optimizations import Optimization
from tests.tiny_models import tiny_config

IDS = torch.arange(48).mul(37).remainder(256).view(2, 24)
PACKED = {"position_ids": torch.cat([torch.arange(9), torch.arange(15)]).expand(2, 24), "use_cache": False}


def test_the_installed_transformers_has_the_sources_that_are_replaced() -> None:
    """A new release of Transformers fails here: read what changed, change the forwards, then the fingerprints."""
    assert fused_mla.found_source() == fused_mla.REPLACED
    assert fused_gpt_oss.found_source() == fused_gpt_oss.REPLACED
    assert fused_mlp.found_sources() == fused_mlp.REPLACED


def pair(
    family: str, fuse: Callable[[torch.nn.Module], Optimization | None], dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One model twice, the first fused; random values everywhere."""
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    fused = copy.deepcopy(plain)
    assert fuse(fused) is not None
    return fused, plain


ATTENTIONS = [
    ("deepseek_v3", "sdpa", fused_mla.fuse_mla, fused_mla.DeepseekV3Attention),
    ("deepseek_v3", "eager", fused_mla.fuse_mla, fused_mla.DeepseekV3Attention),
    ("gpt_oss", "eager", fused_gpt_oss.fuse_gpt_oss, fused_gpt_oss.GptOssAttention),
]


@pytest.mark.parametrize(("family", "attention", "fuse", "kind"), ATTENTIONS)
@pytest.mark.parametrize("inputs", [{"use_cache": False}, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype, inputs, family, attention, fuse, kind) -> None:
    models = pair(family, fuse, dtype)
    assert len(modules_of_class(models[0], kind)) == models[0].config.num_hidden_layers
    for model in models:
        model.set_attn_implementation(attention)
    outs = [model(input_ids=IDS, labels=IDS, **inputs) for model in models]
    assert torch.equal(outs[0].logits, outs[1].logits)
    for out in outs:
        out.loss.backward()
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if theirs.grad is not None:
            # Sums over heads and parts are taken in another order.
            rounding = 1e-5 if dtype == torch.float32 else 3e-2
            assert float((mine.grad - theirs.grad).norm()) <= rounding * float(theirs.grad.norm()), name


@pytest.mark.parametrize(("family", "attention", "fuse", "kind"), ATTENTIONS[1:])
def test_a_cache(family, attention, fuse, kind) -> None:
    fused, plain = (model.eval() for model in pair(family, fuse, torch.float32))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(model.generate(IDS[:, :10], **options) for model in (fused, plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "number"), [("deepseek_v3", 3), ("nemotron_h", 3)])
def test_dense_mlps_and_shared_experts(family: str, number: int, dtype: torch.dtype) -> None:
    fused, plain = pair(family, fused_mlp.fuse_mlps, dtype)
    kind = fused_mlp.DeepseekV3MLP if family == "deepseek_v3" else fused_mlp.NemotronHMLP
    mine = modules_of_class(fused, kind)
    theirs = modules_of_class(plain, kind.__base__)
    assert len(mine) == len(theirs) == number
    x = torch.randn(5, 64).to(dtype)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a(x), b(x))
