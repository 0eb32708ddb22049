"""Rules over several keys, model configs and parameter counts, each refusal with its code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_recipes.config.checks import check_model_config, check_recipe, recipe_notes
from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError, RecipeError
from moe_recipes.config.model_config import PACKAGED, override_config, read_model_config
from moe_recipes.config.recipe import Model, Recipe
from moe_recipes.config.resolve import load_recipe, recipe_from_dict
from moe_recipes.plan.parameters import count_parameters


def recipe_with(*overrides: str) -> Recipe:
    data = {
        "name": "x",
        "model": {"source": "package:tiny_qwen3_moe", "weights": "random"},
        "data": {"format": "random_tokens", "seq_len": 64},
        "optim": {"lr": 1e-3},
        "train": {"steps": 5},
    }
    return recipe_from_dict(data, overrides=overrides)


def test_the_base_of_these_tests_is_accepted() -> None:
    check_recipe(recipe_with())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.ep_size=2"], r"parallel\.ep_size=2 must divide parallel\.fsdp_size=1"),
        (["parallel.fsdp_size=0"], r"parallel\.fsdp_size=0 must be at least 1"),
        (["parallel.dp_replicate_size=-1"], "must be at least 1"),
        (["train.steps=0"], r"train\.steps=0 must be at least 1"),
        (["train.seed=-1"], r"train\.seed=-1 must be at least 0"),
        (["optim.warmup_steps=6"], r"optim\.warmup_steps=6 is more than train\.steps=5"),
        (["optim.lr=0"], r"optim\.lr=0\.0 must be more than 0"),
        (["optim.betas=[0.9]"], "two numbers"),
        (["optim.betas=[0.9, 1.0]"], "less than 1"),
        (["optim.min_lr_ratio=1.5"], "between 0 and 1"),
        (["optim.name=flash_adamw", "model.dtype=float32"], r"set model\.dtype: bfloat16"),
        (
            ["optim.name=lean_adamw", "model.dtype=float32"],
            r"optim\.name=lean_adamw keeps .*set model\.dtype: bfloat16",
        ),
        (["model.weights=pretrained"], "config without weights"),
        (["model.weights=pretrained", "model.source=a/b", "model.config_overrides.x=1"], "would not fit pretrained"),
        (["model.revision=abc"], "needs a Hugging Face id"),
        (["data.format=auto", "data.train=[a]"], r"no tokenizer; set model\.tokenizer"),
        (["data.format=auto", "model.tokenizer=t"], r"data\.train is empty"),
        (["data.train=[a]"], r"reads no rows; remove data\.train"),
        (["data.validation=[a]", "data.validation_fraction=0.1"], r"remove data\.validation, data\.valid"),
        (["data.validation_fraction=1"], "less than 1"),
        (["train.validate_every_steps=2"], "nothing to validate on"),
        (["data.revision=abc"], "applies to hf: data sets only"),
        (["checkpoint.keep_last=0"], "must be at least 1"),
        (["name=a/b"], "names the run folder"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        check_recipe(recipe_with(*overrides))
    assert caught.value.exit_code == 64
    assert "\n" not in str(caught.value)


def test_validation_twice_is_refused_with_files_too() -> None:
    files = ["data.format=auto", "model.tokenizer=t", "data.train=[a]"]
    check_recipe(recipe_with(*files, "data.validation=[b]"))
    with pytest.raises(RecipeError, match="exclude each other"):
        check_recipe(recipe_with(*files, "data.validation=[b]", "data.validation_fraction=0.1"))
    with pytest.raises(RecipeError, match=r"not to 'b'"):
        check_recipe(recipe_with(*files, "data.train=['hf:x/y', b]", "data.revision=abc"))


@pytest.mark.parametrize("key", ["num_experts", "n_routed_experts", "num_local_experts"])
def test_experts_must_divide(key: str) -> None:
    recipe = recipe_with("parallel.fsdp_size=4", "parallel.ep_size=4")
    check_model_config(recipe, {key: 8})
    check_model_config(recipe, {"text_config": {key: 8}})
    with pytest.raises(RecipeError, match=rf"ep_size=4 must divide the 6 experts \({key}\)"):
        check_model_config(recipe, {key: 6})
    with pytest.raises(RecipeError, match="has no experts"):
        check_model_config(recipe, {"model_type": "llama", key: 0})
    check_model_config(recipe_with(), {"model_type": "llama"})


@pytest.mark.parametrize("key", ["num_experts", "n_group", "hidden_size"])
def test_text_in_place_of_a_number_of_the_model_is_named(key: str) -> None:
    with pytest.raises(RecipeError, match=f"^{key}='8' of .* must be a whole number; mend its config.json$"):
        check_model_config(recipe_with(), {"num_experts": 8, key: "8"})


def test_rows_and_experts_a_token_must_fit_the_model() -> None:
    with pytest.raises(RecipeError, match=r"data\.seq_len=64 is more than max_position_embeddings=32"):
        check_model_config(recipe_with(), {"max_position_embeddings": 32})
    with pytest.raises(RecipeError, match="num_experts_per_tok=8 is more than num_experts=4"):
        check_model_config(recipe_with(), {"num_experts": 4, "num_experts_per_tok": 8})


def test_the_default_optimizer_moves_the_weights_of_either_dtype() -> None:
    for dtype, name in (("bfloat16", "lean_adamw"), ("float32", "adamw")):
        recipe = recipe_with(f"model.dtype={dtype}")
        assert recipe.optim.name == name
        assert recipe_notes(recipe) == []
        check_recipe(recipe)
    assert recipe_with("optim.name=adamw").optim.name == "adamw"


def test_notes_say_what_is_rarely_meant() -> None:
    assert any("rounds small updates away" in note for note in recipe_notes(recipe_with("optim.name=adamw")))
    assert recipe_notes(recipe_with("model.dtype=float32")) == []
    assert any("no checkpoint" in note for note in recipe_notes(recipe_with("checkpoint.save_last=false")))


def test_packaged_configs_build_the_model_that_they_name() -> None:
    for folder in PACKAGED.iterdir():
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        raw = json.loads((folder / "config.json").read_text())
        assert raw["architectures"] == [type(model).__name__]
        count = count_parameters(raw)
        assert count is not None
        assert count.total == sum(parameter.numel() for parameter in model.parameters()), folder.name
        assert count.routed == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n), folder.name
        assert count_parameters(config.to_dict()) == count


def test_qwen3_30b_has_the_published_size() -> None:
    config, raw, _ = read_model_config(Model(source="package:qwen3_30b_a3b", weights="random"))
    assert json.loads(raw) == config
    count = count_parameters(config)
    assert count is not None
    assert round(count.total / 1e9, 1) == 30.5
    assert round(count.active / 1e9, 1) in (3.3, 3.4)
    assert config["num_hidden_layers"] == 48
    assert count_parameters({"model_type": "other"}) is None


@pytest.mark.parametrize(
    "change", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, {"tie_word_embeddings": True}]
)
def test_counting_follows_the_odd_settings_of_the_family(change: dict[str, object]) -> None:
    raw = override_config(json.loads((PACKAGED / "tiny_qwen3_moe/config.json").read_text()), change)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    count = count_parameters(raw)
    assert count is not None
    assert count.total == sum(parameter.numel() for parameter in model.parameters())


def test_config_overrides_replace_known_keys_only() -> None:
    recipe = load_recipe("qwen3_30b_1gpu")
    config, raw, _ = read_model_config(recipe.model)
    assert (config["num_experts"], json.loads(raw)["num_experts"]) == (16, 128)
    assert override_config({"a": {"b": 1, "c": 2}}, {"a.b": 3}) == {"a": {"b": 3, "c": 2}}
    with pytest.raises(RecipeError, match="no key 'num_layers'; did you mean 'num_hidden_layers'"):
        override_config(config, {"num_layers": 3})
    with pytest.raises(RecipeError, match="hidden_size is not a mapping"):
        override_config(config, {"hidden_size.x": 3})


def test_where_configs_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="did you mean 'tiny_qwen3_moe'"):
        read_model_config(Model(source="package:tiny_qwen_moe"))
    with pytest.raises(MissingInputError, match="no such folder") as caught:
        read_model_config(Model(source=str(tmp_path / "gone")))
    assert caught.value.exit_code == 66
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        read_model_config(Model(source=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"a": 1')
    with pytest.raises(CorruptCheckpointError, match="not valid JSON"):
        read_model_config(Model(source=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"a":   1}\n')
    assert read_model_config(Model(source=str(tmp_path)))[:2] == ({"a": 1}, b'{"a":   1}\n')


def test_a_hub_id_is_read_from_the_cache_and_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingInputError, match="hf download some/model --revision abc"):
        read_model_config(Model(source="some/model", revision="abc"))
    commit = "0" * 40
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text('{"model_type": "x"}')
    assert read_model_config(Model(source="some/model"))[0] == {"model_type": "x"}
    assert read_model_config(Model(source="some/model", revision=commit))[0] == {"model_type": "x"}
