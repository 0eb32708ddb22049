"""Nemotron-H's mixer and the base models that hand documents on: the values and the seams of Transformers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from transformers.models.nemotron_h import modeling_nemotron_h as hf

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models import documents, float32_kept, mamba
from moe_recipes.models.auto import enable_activation_checkpointing
from tests.ranks.parity import boost, honour_time_step_limit, relative_error, worst
from tests.tiny_models import tiny_config
from tests.unit.scan_reference import slow_conv, slow_gated_norm, slow_scan

IDS = torch.arange(2 * 77).mul(37).remainder(256).view(2, 77)


def pair(family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One boosted model twice: this package's, and eager Transformers with the time-step limit of the config."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    config = tiny_config(family)
    plain = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager", **options)
    boost(plain)
    if family == "nemotron_h":
        honour_time_step_limit(plain)
    ours = AutoModelForCausalLM.from_config(config, **options)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def gradients(model: torch.nn.Module, **inputs: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, **inputs)
    out.loss.backward()
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_installed_transformers_has_the_sources_that_are_replaced() -> None:
    """A new release of Transformers fails here: read what changed, change the forwards, then the fingerprints."""
    assert float32_kept.found_source() == float32_kept.MIXER
    assert documents.found_sources() == documents.REPLACED


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["nemotron_h", "gpt_oss"])
def test_rows_of_one_document_are_as_in_transformers(family: str, padded: bool) -> None:
    ours, plain = pair(family)
    inputs = {"attention_mask": (IDS >= 0).long()} if padded else {}
    if padded:
        inputs["attention_mask"][0, 60:] = 0
        inputs["attention_mask"][1, :9] = 0
    logits, grads = gradients(ours.train(), **inputs)
    expected, expected_grads = gradients(plain.train(), use_cache=False, **inputs)
    seen = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    assert relative_error(logits[seen], expected[seen]) < 1e-5
    error, name = worst(grads, expected_grads)
    assert error < 2e-5, (name, error)
    assert type(ours.base_model) is not type(plain.base_model)


@pytest.mark.parametrize("family", ["nemotron_h", "gpt_oss"])
def test_generation_is_that_of_transformers(family: str) -> None:
    ours, plain = pair(family)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(model.eval().generate(IDS[:, :9], **options) for model in (ours, plain)))


def test_one_mixer_is_the_published_recurrence() -> None:
    """Not Transformers this time: convolution, scan and norm token by token in float64, two documents in a row."""
    torch.manual_seed(0)
    mixer = hf.NemotronHMamba2Mixer(tiny_config("nemotron_h"), layer_idx=0)
    boost(mixer)
    mixer.time_step_limit = (0.0, 0.5)
    assert mamba.lean_mamba(mixer) is not None
    document = torch.tensor([[0] * 40 + [1] * 37, [0] * 11 + [1] * 66])
    hidden = torch.randn(2, 77, 64, requires_grad=True)
    found = mixer(hidden, seq_idx=document)
    found.square().sum().backward()

    wide = copy.deepcopy(mixer).double()
    hidden64 = hidden.detach().double().requires_grad_()
    heads, size, groups, states = wide.num_heads, wide.head_dim, wide.n_groups, wide.ssm_state_size
    gate, conv_in, dt = wide.in_proj(hidden64).split([wide.intermediate_size, wide.conv_dim, heads], dim=-1)
    filtered = slow_conv(conv_in, wide.conv1d.weight.squeeze(1), wide.conv1d.bias, document)
    x, B, C = filtered.split([heads * size, groups * states, groups * states], dim=-1)
    x, B, C = x.view(2, 77, heads, size), B.view(2, 77, groups, states), C.view(2, 77, groups, states)
    y = slow_scan([x, dt, -torch.exp(wide.A_log), B, C, wide.D, wide.dt_bias], (0.0, 0.5), document).flatten(2)
    normed = slow_gated_norm(y, gate, wide.norm.weight, groups=groups, eps=wide.norm.variance_epsilon)
    expected = wide.out_proj(normed)
    wide.zero_grad()
    expected.square().sum().backward()
    assert relative_error(found.detach(), expected.detach()) < 1e-6
    assert relative_error(hidden.grad, hidden64.grad) < 1e-5
    for (name, mine), theirs in zip(mixer.named_parameters(), wide.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-5, name


def test_recomputed_layers_have_the_same_gradients() -> None:
    ours, _ = pair("nemotron_h")
    positions = torch.cat([torch.arange(40), torch.arange(37)]).expand(2, -1)
    logits, plain = gradients(ours.train(), position_ids=positions)
    enable_activation_checkpointing(ours)
    again, recomputed = gradients(ours, position_ids=positions)
    assert torch.equal(logits, again)
    assert worst(recomputed, plain)[0] == 0


@pytest.mark.parametrize("family", ["nemotron_h", "gpt_oss"])
def test_a_row_with_borders_gets_no_cache_that_would_undo_them(family: str) -> None:
    ours, _ = pair(family)
    positions = torch.cat([torch.arange(40), torch.arange(37)]).expand(2, -1)
    whole = ours.eval()(input_ids=IDS, position_ids=positions, use_cache=True).logits
    alone = ours(input_ids=IDS[:, 40:], use_cache=False).logits
    assert relative_error(whole[:, 40:].detach(), alone.detach()) < 1e-5


def test_no_cache_is_made_in_training() -> None:
    """With one Transformers takes the slow path, also where the kernels are installed."""
    ours, _ = pair("nemotron_h")
    caches: list[object] = []
    layer = ours.model.layers[0]
    layer.register_forward_pre_hook(lambda m, args, kwargs: caches.append(kwargs["cache"]), with_kwargs=True)
    ours.train()(input_ids=IDS)
    ours(input_ids=IDS, use_cache=True)
    ours.eval()(input_ids=IDS)
    assert [cache is None for cache in caches] == [True, False, False]


def test_an_adapter_on_the_output_projection_is_called() -> None:
    ours, _ = pair("nemotron_h")
    mixer = ours.model.layers[0].mixer
    assert mamba._is_plain(mixer.out_proj)
    seen: list[torch.Size] = []
    mixer.out_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert not mamba._is_plain(mixer.out_proj)
    ours(input_ids=IDS)
    assert seen == [torch.Size([2, 77, 64])]


@pytest.mark.parametrize("family", ["nemotron_h", "gpt_oss"])
def test_a_model_is_copied_pickled_and_saved(tmp_path, family: str) -> None:
    ours, plain = pair(family)
    expected = ours(input_ids=IDS).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(input_ids=IDS).logits, expected)
    for model, name in ((ours, "ours"), (plain, "plain")):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()


def test_another_mixer_than_the_known_one_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_kept, "mixer_is_known", lambda: False)
    config = tiny_config("nemotron_h")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model.model.layers[0].mixer) is hf.NemotronHMamba2Mixer
    said = {o.name: o for o in model.moe_recipes_optimizations}[mamba.NAME]
    assert (said.applied, said.reason) == (False, "Transformers' Mamba mixer is not the one that they replace")
