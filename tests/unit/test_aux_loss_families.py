"""The trainer's load-balancing loss is that of Transformers, for every family that defines one."""

from __future__ import annotations

import ast

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.blocks import forward_source_of
from moe_recipes.models.loss import Wanted, install_loss
from moe_recipes.prove.weights import boost
from tests.small_configs import plan_bearing, small

FAST = ("gpt_oss", "minimax_m2", "phimoe", "qwen3_moe")
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))


def with_aux_loss() -> list[str]:
    found = []
    for model_type in plan_bearing():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
        forward = forward_source_of(kind[0] if isinstance(kind, tuple) else kind) if kind is not None else None
        if forward is not None and "load_balancing_loss_func" in ast.unparse(forward):
            found.append(model_type)
    return found


FAMILIES = with_aux_loss()


def test_the_families_that_define_one_are_found() -> None:
    assert set(FAST) < set(FAMILIES)
    assert len(FAMILIES) > 20
    assert not {"deepseek_v3", "nemotron_h"} & set(FAMILIES)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in FAMILIES])
def test_loss_and_gradient_are_those_of_transformers(family: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_config(small(family), dtype=torch.float32).train()
    boost(model)
    wanted = model(input_ids=IDS, use_cache=False, output_router_logits=True).aux_loss
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install_loss(model, fused=True, chunk_tokens=24, wanted=Wanted(aux_loss=True))
    found = model(input_ids=IDS, shift_labels=torch.full_like(IDS, -100)).aux
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    assert largest > 0
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * largest, msg=name)
