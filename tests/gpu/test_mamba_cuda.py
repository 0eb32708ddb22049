"""Nemotron-H's Mamba mixer through mamba-ssm and causal-conv1d on a real GPU, beside a token-by-token reference."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h import modeling_nemotron_h as hf

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models import mamba
from moe_recipes.models.packing import why_not_packed
from tests.ranks.parity import boost, relative_error
from tests.unit.scan_reference import documents, slow_conv, slow_gated_norm, slow_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(mamba.fused_kernel() is None, reason="needs mamba-ssm and causal-conv1d"),
]
DOCUMENTS = documents([[130, 1, 69, 100], [300]])
LIMIT = (0.0, float("inf"))


def config(**changes: object) -> NemotronHConfig:
    """Real head sizes; few heads."""
    sizes = {
        "vocab_size": 512, "hidden_size": 256, "hybrid_override_pattern": "MEM*E", "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 4,
        "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128, "moe_latent_size": 128,
    }  # fmt: skip
    return NemotronHConfig(**sizes | changes)


def float64_mixer(mixer: torch.nn.Module, hidden: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    heads, size, groups, states = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    gate, conv_in, dt = mixer.in_proj(hidden).split([mixer.intermediate_size, mixer.conv_dim, heads], dim=-1)
    filtered = slow_conv(conv_in, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, document)
    x, B, C = filtered.split([heads * size, groups * states, groups * states], dim=-1)
    shape = hidden.shape[:2]
    x, B, C = x.view(*shape, heads, size), B.view(*shape, groups, states), C.view(*shape, groups, states)
    y = slow_scan([x, dt, -torch.exp(mixer.A_log), B, C, mixer.D, mixer.dt_bias], LIMIT, document).flatten(2)
    return mixer.out_proj(slow_gated_norm(y, gate, mixer.norm.weight, groups=groups, eps=mixer.norm.variance_epsilon))


def results(mixer: torch.nn.Module, out: torch.Tensor, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    grads = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, **grads}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_kernel_is_the_recurrence(monkeypatch: pytest.MonkeyPatch, packed: bool, training: bool) -> None:
    """bfloat16 weights with float32 A_log, D and dt_bias; the reference has the same values in float64."""
    torch.manual_seed(0)
    mixer = hf.NemotronHMamba2Mixer(config(), layer_idx=0)
    boost(mixer)
    kept = {name: getattr(mixer, name).detach().clone() for name in ("A_log", "D", "dt_bias")}
    mixer = mixer.bfloat16().cuda().train(training)
    for name, value in kept.items():
        setattr(mixer, name, torch.nn.Parameter(value.cuda()))
    mixer.time_step_limit = LIMIT
    said = mamba.lean_mamba(mixer)
    assert said is not None
    assert said.applied, said.reason
    monkeypatch.setattr(mamba, "chunk_scan", None)  # the kernel computes, or this fails
    wide = copy.deepcopy(mixer).double()
    document = DOCUMENTS.cuda() if packed else torch.zeros_like(DOCUMENTS).cuda()
    hidden = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    hidden64 = hidden.detach().double().requires_grad_()
    found = results(mixer, mixer(hidden, seq_idx=document if packed else None), hidden)
    expected = results(wide, float64_mixer(wide, hidden64, document), hidden64)
    assert found["A_log"].dtype == found["D"].dtype == found["dt_bias"].dtype == torch.float32
    for name, value in expected.items():
        assert relative_error(found[name], value) < 3e-2, name


def model_on_gpu(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**changes), dtype=torch.bfloat16, attn_implementation="sdpa").cuda()
    boosted = copy.deepcopy(model).cpu()
    boost(boosted)
    model.load_state_dict(boosted.state_dict())
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_flipped_token_moves_nothing_of_another_document(training: bool) -> None:
    model = model_on_gpu().train(training)
    assert why_not_packed(model) is None
    positions = torch.cat([torch.arange(n) for n in (130, 1, 69, 100)])[None].cuda()
    ids = torch.arange(300).mul(37).remainder(512)[None].cuda()
    flipped = ids.clone()
    flipped[0, 150] = (ids[0, 150] + 100) % 512
    found = []
    for each in (ids, flipped):
        model.zero_grad()
        logits = model(input_ids=each, position_ids=positions, use_cache=False).logits
        logits[:, 200:].float().square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), grads))
    (before, grads_before), (after, grads_after) = found
    assert relative_error(after[:, 200:], before[:, 200:]) < 1e-2
    assert relative_error(after[:, :131], before[:, :131]) < 1e-2
    assert relative_error(after[:, 150:200], before[:, 150:200]) > 5e-2
    for name, gradient in grads_before.items():
        assert relative_error(grads_after[name], gradient) < 3e-2, name


def test_borders_take_the_lean_scan_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without the kernels computes the same, in the scan of the CPU."""
    # Without experts: a choice near a tie would go another way, and show more than the scans differ by.
    model = model_on_gpu(hybrid_override_pattern="M-*M", intermediate_size=256).eval()
    positions = torch.cat([torch.arange(n) for n in (130, 1, 69, 100)])[None].cuda()
    ids = torch.arange(300).mul(37).remainder(512)[None].cuda()
    with torch.no_grad():
        through_kernel = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        monkeypatch.setattr(mamba, "fused_kernel", lambda: None)
        lean = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert relative_error(through_kernel, lean) < 3e-2
