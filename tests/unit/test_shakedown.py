"""The shakedown of a recipe: what is cut, what stays, and when its verdict is PASS."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, GptOssConfig

from moe_recipes.config.checks import check_recipe
from moe_recipes.config.errors import EXIT_RECIPE, MissingInputError, RecipeError
from moe_recipes.config.model_config import PACKAGED, override_config, read_model_config
from moe_recipes.config.recipe import Parallel, Recipe
from moe_recipes.config.resolve import load_recipe, recipe_from_dict, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch import shakedown
from moe_recipes.launch.shakedown import (
    KILL_EVENT,
    KILL_VARIABLE,
    checks,
    kill_environment,
    scaled_layout,
    shakedown_mode,
    shakedown_recipe,
    start_afresh,
    write_verdict,
)
from moe_recipes.plan.small_model import NARROW, few_layers, narrow_widths

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
KEPT = ("parallel", "kernels")


def packaged(name: str) -> dict[str, Any]:
    return json.loads((PACKAGED / name / "config.json").read_bytes())


def small_config(recipe: Recipe) -> dict[str, Any]:
    return read_model_config(recipe.model)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_has_a_shakedown_on_its_own_layout(name: str) -> None:
    recipe = load_recipe(name)
    small = shakedown_recipe(recipe)
    check_recipe(small)
    assert recipe_from_dict(recipe_to_dict(small)) == small
    assert all(getattr(small, section) == getattr(recipe, section) for section in KEPT)
    kept = ("dtype", "attn_implementation")
    assert [getattr(small.model, key) for key in kept] == [getattr(recipe.model, key) for key in kept]
    assert small.optim == dataclasses.replace(recipe.optim, warmup_steps=0)
    assert small.data.seq_len == recipe.data.seq_len
    same = ("micro_batch_size", "activation_checkpointing", "seed")
    assert [getattr(small.train, key) for key in same] == [getattr(recipe.train, key) for key in same]
    assert (small.model.weights, small.data.format, small.data.train) == ("random", "random_tokens", ())
    assert (small.train.steps, small.checkpoint.every_steps, small.checkpoint.export) == (3, 2, True)
    assert small.name == f"{name}-shakedown"
    assert small.run_dir == (f"{recipe.run_dir}-shakedown" if recipe.run_dir else None)


def test_the_largest_recipe_keeps_its_widths_and_one_layer_of_each_kind() -> None:
    small = small_config(shakedown_recipe(load_recipe("nemotron_ultra_550b")))
    full = packaged("nemotron_3_ultra_550b")
    changed = {key for key in full if small[key] != full[key]}
    assert changed == {"layers_block_type", "num_hidden_layers"}
    assert small["layers_block_type"] == ["mamba", "moe", "attention"]
    assert small["num_hidden_layers"] == 3
    nano = small_config(shakedown_recipe(load_recipe("nemotron_nano_30b")))
    assert nano["hybrid_override_pattern"] == "ME*"


def test_narrow_on_other_ranks_scales_the_layout_and_keeps_experts_divisible() -> None:
    small = shakedown_recipe(load_recipe("nemotron_ultra_550b"), narrow=True, num_ranks=16)
    assert (small.parallel.fsdp_size, small.parallel.ep_size, small.parallel.efsdp_size) == (16, 8, 2)
    config = small_config(small)
    assert config["n_routed_experts"] == 16
    assert config["num_experts_per_tok"] == 8
    assert all(config[key] <= most for key, most in NARROW.items() if isinstance(config.get(key), int))
    assert (small.model.dtype, small.optim.name, small.train.micro_batch_size) == ("float32", "adamw", 1)
    assert small.train.activation_checkpointing == "full"
    assert shakedown_recipe(load_recipe("nemotron_ultra_550b"), narrow=True).parallel.ep_size == 64


def test_other_ranks_without_narrow_are_refused() -> None:
    with pytest.raises(RecipeError, match="own 128 ranks, not on 16; with MOE_SHAKEDOWN=narrow") as caught:
        shakedown_recipe(load_recipe("nemotron_ultra_550b"), num_ranks=16)
    assert caught.value.exit_code == EXIT_RECIPE


@pytest.mark.parametrize(
    ("layout", "num_ranks", "wanted"),
    [
        ((128, 64, 1), 16, (16, 8, 1)),
        ((128, 64, 1), 128, (128, 64, 1)),
        ((128, 64, 1), 2, (2, 1, 1)),
        ((128, 64, 1), 3, (3, 1, 1)),
        ((8, 8, 1), 4, (4, 4, 1)),
        ((8, 8, 2), 4, (2, 2, 2)),
        ((4, 1, 1), 2, (2, 1, 1)),
        ((2, 2, 1), 1, (1, 1, 1)),
        ((2, 2, 1), 8, (8, 2, 1)),
    ],
)
def test_scaled_layouts(layout: tuple[int, ...], num_ranks: int, wanted: tuple[int, ...]) -> None:
    names = ("fsdp_size", "ep_size", "dp_replicate_size")
    scaled = scaled_layout(Parallel(**dict(zip(names, layout, strict=True))), num_ranks)
    assert (scaled.fsdp_size, scaled.ep_size, scaled.dp_replicate_size) == wanted
    assert scaled.fsdp_size % scaled.ep_size == 0


def test_a_layout_that_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"3 ranks cannot hold parallel\.dp_replicate_size=2"):
        scaled_layout(Parallel(fsdp_size=4, ep_size=2, dp_replicate_size=2), 3)


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3_30b", [f"model.source={tmp_path}"])
    with pytest.raises(MissingInputError, match=r"has no config\.json"):
        shakedown_recipe(recipe)


FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": DeepseekV3Config(
        num_hidden_layers=6, first_k_dense_replace=3, n_routed_experts=16, num_nextn_predict_layers=1
    ).to_dict(),
    "gpt_oss": GptOssConfig(num_hidden_layers=6, num_local_experts=16).to_dict(),
    **{name: packaged(name) for name in ("qwen3_30b_a3b", "nemotron_3_ultra_550b", "nemotron_3_nano_30b")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_and_narrowed_models_of_other_families_compute(family: str) -> None:
    plain = FAMILIES[family]
    cut = few_layers(plain)
    small = override_config(plain, {**cut, **narrow_widths(plain, ep_size=4)})
    torch.manual_seed(0)
    config = AutoConfig.for_model(**small)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    kinds = {type(module).__name__ for module in model.modules()}
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    assert kinds == {type(module).__name__ for module in whole.modules()}  # every part of the true model is there
    assert len(model.base_model.layers) == config.num_hidden_layers in (2, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert model(input_ids=torch.arange(20)[None]).logits.isfinite().all()


def test_dense_layers_stay_dense() -> None:
    qwen = {**packaged("qwen3_30b_a3b"), "mlp_only_layers": [0, 1], "decoder_sparse_step": 2}
    assert few_layers(qwen) == {"num_hidden_layers": 2, "mlp_only_layers": [0], "decoder_sparse_step": 1}
    deepseek = {"num_hidden_layers": 61, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1}
    wanted = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    assert few_layers(deepseek) == wanted
    assert few_layers({"text_config": deepseek}) == {f"text_config.{key}": value for key, value in wanted.items()}
    assert few_layers({"num_hidden_layers": 1}) == {"num_hidden_layers": 1}
    with pytest.raises(RecipeError, match="its layers cannot be cut"):
        few_layers({"model_type": "odd"})


def test_the_mode_is_read_strictly() -> None:
    values = {"": "off", "0": "off", "1": "full", "narrow": "narrow"}
    assert {value: shakedown_mode({"MOE_SHAKEDOWN": value}) for value in values} == values
    assert shakedown_mode({}) == "off"
    with pytest.raises(RecipeError, match="MOE_SHAKEDOWN='yes' must be 1, or narrow"):
        shakedown_mode({"MOE_SHAKEDOWN": "yes"})


def write_run(path: Path, *, without: str = "") -> RunFolder:
    """The files of a shakedown that went well, as the trainer writes them; one thing may be left out."""
    folder = RunFolder(path)
    folder.new_attempt()
    losses = [{"step": step, "loss": float("nan") if (without, step) == ("finite", 2) else 6.0} for step in (1, 2, 3)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in losses if without != f"step{line['step']}"))
    events: list[tuple[str, dict[str, Any]]] = [
        ("checkpoint", {"step": 2}),
        (KILL_EVENT, {"step": 2, "rank": 1}),
        ("resume", {"step": 2}),
        ("checkpoint", {"step": 3}),
        ("export", {"step": 3}),
    ]
    text = ""
    for second, (name, fields) in enumerate(events):
        if without != name:
            text += json.dumps({"time": f"2026-01-01T00:00:0{second}.000Z", "event": name, **fields}) + "\n"
    folder.events.write_text(text)
    if without != "second start":
        folder.new_attempt()
    folder.write_status("failed" if without == "end" else "done", step=3, last_durable_step=3, exit_code=0)
    folder.export.mkdir()
    (folder.export / "config.json").write_text("{}")
    (folder.export / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one", "b": "two"}}')
    for name in ("one", "two") if without != "weights" else ("one",):
        (folder.export / name).write_text("x")
    return folder


def test_a_shakedown_that_went_well_passes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x-shakedown")
    assert write_verdict(folder) is True
    verdict = json.loads((folder.path / "shakedown.json").read_bytes())
    assert verdict["verdict"] == "PASS"
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == []
    assert len(verdict["checks"]) == 7


@pytest.mark.parametrize(
    ("without", "failed"),
    [
        ("finite", ["trained"]),
        ("step3", ["trained"]),
        ("checkpoint", ["saved"]),
        (KILL_EVENT, ["killed", "resumed"]),
        ("second start", ["requeued"]),
        ("resume", ["resumed"]),
        ("export", ["exported"]),
        ("weights", ["exported"]),
        ("end", ["done"]),
    ],
)
def test_each_missing_part_fails_the_verdict(tmp_path: Path, without: str, failed: list[str]) -> None:
    folder = write_run(tmp_path / "x-shakedown", without=without)
    assert [check.name for check in checks(folder) if not check.passed] == failed
    assert write_verdict(folder) is False
    assert json.loads((folder.path / "shakedown.json").read_bytes())["verdict"] == "FAIL"


def test_an_empty_folder_fails_every_check(tmp_path: Path) -> None:
    assert [check.passed for check in checks(RunFolder(tmp_path))] == [False] * 7


def test_one_rank_is_told_to_die_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    chosen = {kill_environment(folder, num_ranks=16, job_id=job)[KILL_VARIABLE] for job in range(200)}
    assert chosen == {f"{rank}:{shakedown.SAVED_STEP}" for rank in range(16)}
    folder.append_event(KILL_EVENT, step=2, rank=3)
    assert kill_environment(folder, num_ranks=16, job_id=1) == {}


def test_an_old_shakedown_is_cleared_and_nothing_else_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x-shakedown")
    (folder.path / "slurm").mkdir()
    (folder.path / "slurm" / "ledger.jsonl").write_text("{}\n")
    start_afresh(folder)
    assert [item.name for item in folder.path.iterdir()] == ["slurm"]
    assert (folder.path / "slurm" / "ledger.jsonl").exists()
    start_afresh(RunFolder(tmp_path / "new-shakedown"))
    real = write_run(tmp_path / "x")
    before = sorted(real.path.rglob("*"))
    with pytest.raises(RecipeError, match="nothing was removed"):
        start_afresh(real)
    assert sorted(real.path.rglob("*")) == before
