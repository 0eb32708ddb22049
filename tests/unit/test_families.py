"""What is declared of each family, held against Transformers' own classes; and each published model's recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_recipes.config.checks import EXPERT_COUNT_KEYS, check_model_config, check_recipe
from moe_recipes.config.errors import EXIT_RECIPE, RecipeError
from moe_recipes.config.model_config import PACKAGED, PACKAGED_NAMES
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe
from moe_recipes.families import CORRECTION_BIAS, FAMILIES, PUBLISHED, Family, Published, family_of
from moe_recipes.launch.cli import main
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.plan.parameters import count_parameters
from moe_recipes.plan.states import checkpoint_bytes, device_bytes, export_bytes

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "qwen3_moe": "tiny_qwen3_moe",
    "nemotron_h": "tiny_nemotron_h",
    "gpt_oss": "tiny_gpt_oss",
    "deepseek_v3": "tiny_deepseek_v3",
}
COMMIT = re.compile(r"[0-9a-f]{40}")
MODELS = [pytest.param(family, model, id=model.recipe) for family in FAMILIES for model in family.published]


def packaged(name: str) -> dict[str, Any]:
    return json.loads((PACKAGED / name / "config.json").read_bytes())


def built(family: Family, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**packaged(TINY[family.name]))
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_experts_are_those_of_transformers(family: Family) -> None:
    model = built(family)
    experts = moe_blocks(model)[0].experts
    declared = family.experts
    found = (experts.has_gate, experts.has_bias, experts.is_transposed, not experts.is_concatenated)
    assert found == (declared.gated, declared.bias, declared.transposed, declared.interleaved)
    assert packaged(TINY[family.name])[declared.count_key] == experts.num_experts
    assert declared.count_key in EXPERT_COUNT_KEYS
    wide = torch.linspace(-12, 12, 16, dtype=torch.float32)
    if declared.activation == "clamped swiglu":
        gate, up = wide.repeat_interleave(2)[::2].clamp(max=7.0), wide.clamp(-7.0, 7.0)
        both = torch.stack([wide, wide], dim=-1).flatten()
        assert torch.allclose(experts._apply_gate(both), (up + 1) * gate * torch.sigmoid(1.702 * gate), rtol=1e-3)
    else:
        wanted = {"silu": torch.nn.functional.silu, "relu2": lambda x: x.relu().square()}[declared.activation]
        assert torch.allclose(experts.act_fn(wide), wanted(wide))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_routers_compute_as_declared(family: Family) -> None:
    """The dtype of the product shows in a sum that bfloat16 cannot hold."""
    router = moe_blocks(built(family))[0].router
    assert router is not None
    assert hasattr(router, CORRECTION_BIAS) == family.router.correction_bias
    if family.router.correction_bias:
        assert getattr(router, CORRECTION_BIAS).dtype == torch.float32
    hidden = torch.zeros(1, router.weight.shape[1], dtype=torch.bfloat16)
    hidden[0, :2] = 1
    weight = torch.zeros_like(router.weight)
    weight[0, 0], weight[0, 1] = 1, 2**-10  # 1 + 2^-10 is 1 in bfloat16
    router.weight.data.copy_(weight)
    with torch.no_grad():
        logits, weights, _ = router(hidden)
    exact = family.router.logits == "float32"
    assert (float(logits[0, 0]) > 1) == exact
    assert logits.dtype == weights.dtype == (torch.float32 if exact else torch.bfloat16)
    assert ("output_router_logits" in packaged(TINY[family.name])) == family.router.aux_loss


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_weights_of_the_chosen_experts_follow_from_the_declared_scores(family: Family) -> None:
    router = moe_blocks(built(family, torch.float32))[0].router
    assert router is not None
    config = packaged(TINY[family.name])
    router.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(32, router.weight.shape[1], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, weights, chosen = router(hidden)
    taken = logits.gather(1, chosen)
    if family.router.scores == "softmax of the chosen":
        wanted = taken.softmax(dim=-1)
    else:
        scores = logits.softmax(dim=-1) if family.router.scores == "softmax" else logits.sigmoid()
        wanted = scores.gather(1, chosen)
        wanted = wanted / wanted.sum(dim=-1, keepdim=True) * config.get("routed_scaling_factor", 1.0)
    assert torch.allclose(weights, wanted, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_with_groups_choose_within_the_best_of_them(family: Family) -> None:
    config = packaged(TINY[family.name])
    assert ("n_group" in config) == family.router.groups
    if not family.router.groups:
        return
    grouped = AutoConfig.for_model(**{**config, "n_group": 4, "topk_group": 1})
    router = moe_blocks(AutoModelForCausalLM.from_config(grouped, dtype=torch.float32))[0].router
    assert router is not None
    router.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chosen = router(torch.randn(32, grouped.hidden_size, generator=torch.Generator().manual_seed(2)))[2]
    experts = config[family.experts.count_key]
    assert all(len(set((row // (experts // 4)).tolist())) == 1 for row in chosen)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_attention_and_float32_parts_are_those_of_transformers(family: Family) -> None:
    model = built(family, torch.float32)
    assert bool(model._supports_sdpa) == family.sdpa
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert set(family.float32) <= names
    assert family_of(model.config.model_type) is family
    assert {name for name in names if name in ("A_log", "D", "dt_bias")} == set(family.float32)


def test_lookup() -> None:
    assert family_of({"model_type": "gpt_oss"}) is FAMILIES[2]
    assert family_of({}) is family_of(None) is family_of("unheard_of") is None
    assert set(PACKAGED_NAMES) == set(PUBLISHED)
    assert len({model.recipe for model in PUBLISHED.values()}) == len(PUBLISHED)


def facts_of(family: Family, model: Published) -> tuple[Recipe, dict[str, Any]]:
    recipe = load_recipe(str(ROOT / "recipes" / f"{model.recipe}.yaml"))
    return recipe, packaged(model.packaged)


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_each_published_model_has_a_recipe_that_can_be_repeated(family: Family, model: Published) -> None:
    recipe, config = facts_of(family, model)
    check_recipe(recipe)
    check_model_config(recipe, config)
    assert family_of(config) is family
    assert (recipe.model.source, recipe.model.revision) == (model.source, model.revision)
    assert COMMIT.fullmatch(model.revision)
    assert COMMIT.fullmatch(recipe.data.revision or "")
    assert recipe.model.attn_implementation == "moe_recipes" or family.sdpa
    assert 0 < recipe.checkpoint.every_steps <= recipe.train.steps // 2
    assert recipe.train.micro_batch_size == 1


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_what_a_recipe_says_in_words_is_what_follows_from_it(family: Family, model: Published) -> None:
    recipe, config = facts_of(family, model)
    text = " ".join(line.lstrip("# ") for line in (ROOT / "recipes" / f"{model.recipe}.yaml").read_text().splitlines())
    count = count_parameters(config)
    assert count is not None
    states = device_bytes(count, recipe)
    assert states is not None
    assert f"{states / 2**30:.1f} GiB of" in text
    assert f"over {recipe.parallel.num_ranks} GPUs" in text
    assert f"Global batch {recipe.rows_per_step} rows, {recipe.tokens_per_step:,} tokens; local batch 1." in text
    assert "licence" in text or "Apache-2.0" in text
    # Half of 80 GB is left for activations, gathered layers and the allocator.
    assert states < 44e9
    # A layer's experts, as this rank holds them, are whole numbers of experts.
    assert config[family.experts.count_key] % recipe.parallel.ep_size == 0


def test_bytes_by_optimizer() -> None:
    recipe, config = facts_of(FAMILIES[1], FAMILIES[1].published[2])
    count = count_parameters(config)
    assert count is not None
    assert count.trained == 549_308_968_960 + 11_215_609_856
    assert checkpoint_bytes(count, recipe) == int(count.trained * 6.0625)
    assert export_bytes(count, recipe) == 2 * count.trained
    assert device_bytes(count, recipe) == (int(count.trained * 6.0625) + 2 * count.trained) // 128


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_show_needs_no_network_for_any_published_model(
    family: Family, model: Published, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("show connects"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no/such/cache")
    assert main(["show", model.recipe, "--json"]) == 0
    derived = json.loads(capsys.readouterr().out)["derived"]
    assert derived["model config"] == f"config of the package, {model.packaged}"
    assert round(derived["parameters"] / 1e9, 2) == model.total
    assert derived.get("predict further tokens", 0) == pytest.approx(model.mtp * 1e9, abs=5e6)
    assert float(derived["training FLOPs a token"]) > 6 * (model.active - 1.2) * 1e9


def refusal(recipe: Recipe, config: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check_model_config(recipe, config)
    assert caught.value.exit_code == EXIT_RECIPE
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_of_another_family_is_refused() -> None:
    recipe = load_recipe("qwen3_30b")
    said = refusal(recipe, packaged("nemotron_3_nano_30b"))
    assert said == (
        "model.source='Qwen/Qwen3-30B-A3B' has a config.json of model_type 'nemotron_h', which is not that model's;"
        " fetch the model again"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("qwen3_30b", "model.weights=random", "model.config_overrides.n_routed_experts=8"),
         "the model's config has no key 'n_routed_experts'; did you mean"),
        (("deepseek_v3_671b", "parallel.ep_size=96", "parallel.fsdp_size=96"),
         "parallel.ep_size=96 must divide the 256 experts (n_routed_experts) of deepseek-ai/DeepSeek-V3"),
        (("nemotron_super_120b", "parallel.ep_size=24", "parallel.fsdp_size=24"),
         "parallel.ep_size=24 must divide the 512 experts (n_routed_experts)"),
        (("gpt_oss_20b", "model.trust_remote_code=true"), "unknown key 'model.trust_remote_code'"),
        (("gpt_oss_20b", "data.seq_len=200000"), "more than max_position_embeddings=131072"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/no/such/cache")
    name, *overrides = words
    assert main(["show", name, *[word for one in overrides for word in ("--set", one)]]) == EXIT_RECIPE
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert message in said
