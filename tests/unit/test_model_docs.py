"""docs/models.md, docs/models/ and docs/reproduce-ultra-550b.md agree with the code: figures, commands, links."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.model_config import PACKAGED, read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe
from moe_recipes.families import FAMILIES, PUBLISHED
from moe_recipes.launch.cli import VERBS, make_parser
from moe_recipes.launch.shakedown import shakedown_recipe
from moe_recipes.plan.flops import train_flops_per_token
from moe_recipes.plan.parameters import ParameterCount, count_parameters
from moe_recipes.plan.states import checkpoint_bytes, device_bytes, export_bytes
from tests.unit.test_house import table_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "models.md", DOCS / "reproduce-ultra-550b.md", *sorted((DOCS / "models").glob("*.md"))]
ULTRA = "nemotron_ultra_550b"
ELSEWHERE = ("make", "export", "docker")
"""First words of command lines that are no part of this project."""


def command_lines(path: Path) -> list[str]:
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s{2,}#", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def facts(recipe_name: str) -> tuple[Recipe, dict[str, Any], ParameterCount]:
    recipe = load_recipe(recipe_name)
    packaged = PUBLISHED[recipe.model.source].packaged
    config = json.loads((PACKAGED / packaged / "config.json").read_bytes())
    count = count_parameters(config)
    assert count is not None
    return recipe, config, count


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_command_is_one_that_exists(path: Path) -> None:
    lines = command_lines(path)
    assert len(lines) >= 5 or path.stem == "models"
    for line in lines:
        words = shlex.split(line)
        if words[0] == "sbatch":
            script = next(word for word in words[1:] if not word.startswith("-"))
            assert (ROOT / script).is_file(), line
        elif words[0] == "moe-recipes":
            assert words[1] in VERBS, line
            options = make_parser(words[1]).parse_args(words[1:])
            assert options.verb == words[1], line
            recipe = getattr(options, "recipe", None)
            assert recipe is None or load_recipe(recipe), line
        else:
            assert words[0] in ELSEWHERE, line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_tests_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    known = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+", text)) <= known
    assert [name for name in re.findall(r"moe_recipes/\w+/\w+\.py", text) if not (ROOT / name).is_file()] == []


def test_the_table_of_models_holds_what_follows_from_the_recipes() -> None:
    rows = {row[0]: row for row in table_of(DOCS / "models.md", "| model | ")}
    assert set(rows) == {model.name for model in PUBLISHED.values()}
    for model in PUBLISHED.values():
        recipe, config, count = facts(model.recipe)
        states, flops = device_bytes(count, recipe), train_flops_per_token(config, seq_len=4096)
        assert states is not None
        assert flops is not None
        parallel, row = recipe.parallel, rows[model.name]
        assert row[1] == f"{count.total / 1e9:.2f} B, {count.active / 1e9:.2f} B"
        assert row[2] == (f"{count.mtp / 1e9:.2f} B" if count.mtp else "-")
        assert row[3] == f"{flops / 1e9:.1f}"
        assert row[4] == f"{parallel.num_ranks // 8} x 8, {parallel.ep_size} x {parallel.efsdp_size}"
        assert row[5].startswith(f"{states / 2**30:.1f} / ")
        assert f"(../recipes/{model.recipe}.yaml)" in row[6]


def test_each_family_has_a_page_with_its_figures() -> None:
    for family in FAMILIES:
        text = (DOCS / "models" / f"{family.name}.md").read_text()
        assert f"moe_recipes/families/{family.name}.py" in text
        for model in family.published:
            recipe, _, count = facts(model.recipe)
            checkpoint = checkpoint_bytes(count, recipe)
            assert checkpoint is not None
            said = [f"{n / 1e9:.2f} B" for n in (count.total, count.routed, count.active)]
            assert ", ".join(said) in text
            assert f"{checkpoint / 1e12:.2f} TB" in text
            assert f"GiB of {recipe.parallel.num_ranks}" in text
            assert f"recipes/{model.recipe}.yaml" in text
            if model.format != "bf16":
                export = export_bytes(count, recipe)
                assert (f"{export / 1e12:.2f} TB" if export > 1e12 else f"{export / 1e9:.1f} GB") in text


def test_what_reproducing_ultra_costs_is_arithmetic_on_the_recipe() -> None:
    text = (DOCS / "reproduce-ultra-550b.md").read_text()
    recipe, config, count = facts(ULTRA)
    checkpoint = checkpoint_bytes(count, recipe)
    assert checkpoint is not None
    source = PUBLISHED[recipe.model.source].file_bytes
    assert source is not None
    ranks, tokens, steps = recipe.parallel.num_ranks, recipe.tokens_per_step, recipe.train.steps
    step_s = tokens / ranks / 412
    for said in (
        f"{count.trained:,} parameters",
        f"{checkpoint / 1e12:.3f} TB",
        f"{(recipe.checkpoint.keep_last + 1) * checkpoint / 1e12:.2f} |",
        f"{tokens:,} tokens a step",
        f"{step_s:.1f} s a step | {steps * step_s / 3600:.2f} | {steps * step_s / 3600 * ranks:.0f} |",
        f"{checkpoint / 16e9 / 60:.1f} minutes each",
        f"{source / 1e12:.3f} TB",
        f"{source:,} bytes",
        recipe.model.revision or "no revision",
        recipe.data.revision or "no revision",
    ):
        assert said in text, said
    flops = train_flops_per_token(config, seq_len=recipe.data.seq_len)
    assert flops is not None
    assert f"{412 * flops / 1e12:.0f} TFLOP/s a GPU, {412 * flops / 989e12:.0%}".replace("%", " %") in text
    saves = steps // recipe.checkpoint.every_steps
    assert f"| {saves} saves |" in text
    small = shakedown_recipe(recipe)
    cut = count_parameters(read_model_config(small.model)[0])
    assert cut is not None
    assert f"{cut.trained / 1e9:.1f} B parameters" in text
    shakedown = (2 * 6.0625 + 2) * cut.trained / 1e12
    assert f"| {shakedown:.2f} |" in text
    total = 0.06 + source / 1e12 + 3 * checkpoint / 1e12 + export_bytes(count, recipe) / 1e12 + shakedown
    assert f"**{total:.1f}; have 15**" in text
