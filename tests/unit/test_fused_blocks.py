"""Qwen3-MoE's attention and layer with fused forwards: the values, hooks and fallbacks of Transformers' own."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from moe_recipes.models.auto import enable_activation_checkpointing
from moe_recipes.models.blocks import fingerprint
from moe_recipes.models.fused import attention as fused_attention
from moe_recipes.models.fused import residual as fused_residual
from moe_recipes.models.fused.attention import fuse_attention
from moe_recipes.models.fused.norms import fuse_norms
from moe_recipes.models.fused.residual import fuse_residual
from tests.tiny_models import tiny_config

IDS = torch.arange(48).mul(37).remainder(256).view(2, 24)
LAYERS = 2


def models(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One model twice, the first with fused blocks; random values everywhere, also in the norms."""
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), dtype=dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    fused = copy.deepcopy(plain)
    for fuse in (fuse_norms, fuse_attention, fuse_residual):
        fuse(fused)
    return fused, plain


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each fused kernel was called."""
    counted: Counter = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for module, name in ((fused_attention, "qk_norm_rope"), (fused_residual, "add_rms_norm")):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counted


def same_step(fused: torch.nn.Module, plain: torch.nn.Module, **inputs: Any) -> None:
    """Logits and every gradient, bit for bit; the weights of head norms add theirs up in another order of heads."""
    outs = [model(input_ids=IDS, labels=IDS, **inputs) for model in (fused, plain)]
    assert torch.equal(outs[0].logits, outs[1].logits)
    for out in outs:
        out.loss.backward()
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
        else:
            assert torch.equal(mine.grad, theirs.grad), name


def test_the_installed_transformers_has_the_sources_that_are_replaced() -> None:
    """A new release of Transformers fails here: read what changed, change the forwards, then the fingerprints."""
    assert fused_attention.found_source() == fused_attention.REPLACED
    assert fused_residual.found_source() == fused_residual.REPLACED


def test_fingerprints_see_what_runs_and_nothing_else() -> None:
    def one(x: int, y: int = 1) -> int:
        return x + y

    def same(x: int, y: int = 1) -> int:
        """Says more."""
        return x + y  # and more

    def other_default(x: int, y: int = 2) -> int:
        return x + y

    def other_body(x: int, y: int = 1) -> int:
        return x - y

    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(f) for f in (one, other_default, other_body)}) == 3


PADDED = {"attention_mask": torch.tensor([[0] * 5 + [1] * 19, [1] * 24])}
PACKED = {"position_ids": torch.cat([torch.arange(9), torch.arange(15)]).expand(2, 24), "use_cache": False}
"""With a cache Transformers does not look for documents in the position ids."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", [{}, PADDED, PACKED], ids=["plain", "padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_transformers_own(calls, dtype, inputs, attention):
    fused, plain = models(dtype)
    for model in (fused, plain):
        model.set_attn_implementation(attention)
    same_step(fused, plain, **inputs)
    assert calls == {"qk_norm_rope": LAYERS, "add_rms_norm": LAYERS}


def test_a_cache_and_what_transformers_records(calls):
    fused, plain = (model.eval() for model in models())
    outs = []
    for model in (fused, plain):
        with torch.no_grad():
            first = model(IDS, use_cache=True, output_hidden_states=True)
            outs.append((first, model(IDS[:, :3], past_key_values=first.past_key_values)))
    assert calls["qk_norm_rope"] == 2 * LAYERS
    for mine, theirs in zip(*outs, strict=True):
        assert torch.equal(mine.logits, theirs.logits)
    hidden = [first.hidden_states for first, _ in outs]
    assert len(hidden[0]) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(*hidden, strict=True))


def test_recomputation_runs_the_fused_forward_again(calls):
    fused, plain = models()
    enable_activation_checkpointing(fused)
    same_step(fused.train(), plain.train())
    assert calls == {"qk_norm_rope": 2 * LAYERS, "add_rms_norm": 2 * LAYERS}


def test_hooks_on_the_norms_are_called(calls):
    fused, plain = models()
    layer, seen = fused.model.layers[1], []
    layer.self_attn.k_norm.register_forward_hook(lambda *_: seen.append("k"))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda *_: seen.append("post"))
    same_step(fused, plain)
    assert seen == ["k", "post"]
    assert calls == {"qk_norm_rope": LAYERS - 1, "add_rms_norm": LAYERS - 1}


def test_another_forward_of_a_norm_is_used(calls):
    fused, _ = models()
    attention = fused.model.layers[0].self_attn
    attention.q_norm.forward = lambda x: x * 0
    attention(torch.randn(1, 3, 64), (torch.ones(1, 3, 16), torch.zeros(1, 3, 16)), None)
    assert calls["qk_norm_rope"] == 0


def test_float64_is_transformers_own(calls):
    fused, plain = models(torch.float64)
    for model in (fused, plain):
        model.set_experts_implementation("eager")
    same_step(fused, plain)
    assert not calls


def test_the_whole_graph_compiles(calls):
    fused, plain = models()
    torch._dynamo.reset()
    hidden, rope = torch.randn(1, 3, 64), (torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    attention = torch.compile(fused.model.layers[0].self_attn, backend="aot_eager", fullgraph=True)
    expected = plain.model.layers[0].self_attn(hidden, rope, None)[0]
    torch.testing.assert_close(attention(hidden, rope, None)[0], expected)
    assert not calls


def test_names_inheritance_copies_and_pickles():
    fused, plain = models()
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for (name, mine), theirs in zip(model.named_modules(), plain.modules(), strict=True):
            assert type(mine).__name__ == type(theirs).__name__, name
            assert isinstance(mine, type(theirs)), name
        assert type(model.model.layers[0]) is fused_residual.Qwen3MoeDecoderLayer
        assert type(model.model.layers[0].self_attn) is fused_attention.Qwen3MoeAttention
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_another_source_is_left_alone(monkeypatch):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return "of a later release"

    monkeypatch.setattr(hf.Qwen3MoeAttention, "forward", forward)
    monkeypatch.setattr(hf.Qwen3MoeDecoderLayer, "forward", forward)
    _, model = models()
    for fuse, what in ((fuse_attention, "Qwen3MoeAttention"), (fuse_residual, "Qwen3MoeDecoderLayer")):
        assert fuse(model)[1:] == (False, f"Transformers' {what} is not the one that it replaces")
    assert type(model.model.layers[0]) is hf.Qwen3MoeDecoderLayer
    assert type(model.model.layers[0].self_attn) is hf.Qwen3MoeAttention


def test_other_families_and_replaced_forwards_are_left_alone():
    llama = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert fuse_attention(llama)[1:] == (False, "no Qwen3MoeAttention in the model")
    assert fuse_residual(llama)[1:] == (False, "no Qwen3MoeDecoderLayer in the model")
    _, model = models()
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    fuse_attention(model)
    assert type(attention) is hf.Qwen3MoeAttention
    assert type(model.model.layers[1].self_attn) is fused_attention.Qwen3MoeAttention
