"""Recipe files: what is read, and every refusal with its file, line and code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_recipes.config.checks import check_model_config, check_recipe
from moe_recipes.config.errors import EXIT_RECIPE, RecipeError
from moe_recipes.config.model_config import PACKAGED_NAMES, read_model_config
from moe_recipes.config.recipe import Model, Recipe
from moe_recipes.config.resolve import dump, load_recipe, recipe_from_dict, recipe_to_dict

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = """\
model: {source: package:tiny_qwen3_moe, weights: random}
data: {format: random_tokens, seq_len: 64}
optim:
  lr: 1e-3
train:
  steps: 5
"""


def write(folder: Path, text: str, name: str = "x.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == EXIT_RECIPE == 64
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_resolves_and_survives_json_and_yaml(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path))
    check_recipe(recipe)
    if recipe.model.source.startswith("package:"):
        config, _, _ = read_model_config(recipe.model)
        check_model_config(recipe, config)
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe
    assert yaml.safe_load(dump(recipe)) == recipe_to_dict(recipe)  # a YAML 1.1 reader sees the same


def test_there_are_recipes() -> None:
    known = {"tiny_cpu", "tiny_nemotron", "qwen3_30b", "qwen3_30b_2gpu", "qwen3_30b_1gpu"}
    assert known | {"nemotron_nano_30b", "nemotron_ultra_550b"} <= {path.stem for path in RECIPES}


def test_the_layout_of_the_largest_recipe_fits_its_model() -> None:
    recipe = load_recipe("nemotron_ultra_550b")
    assert (recipe.parallel.num_ranks, recipe.parallel.ep_size, recipe.parallel.efsdp_size) == (128, 64, 2)
    packaged = PACKAGED_NAMES[recipe.model.source]
    config, _, _ = read_model_config(Model(source=f"package:{packaged}", weights="random"))
    check_model_config(recipe, config)
    assert config["n_routed_experts"] // recipe.parallel.ep_size == 8


def test_defaults_and_name_come_from_the_dataclass_and_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.name == "x"
    assert recipe.optim.lr == 1e-3
    assert recipe.data.train == ()
    assert recipe.parallel.num_ranks == 1


def test_words_of_yaml_1_1_stay_text_and_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    text = MINIMAL + "log: {wandb: off}\n"
    recipe = load_recipe(write(tmp_path, text.replace("seq_len: 64", "seq_len: 1_024, revision: 0123")))
    assert recipe.log.wandb == "off"
    assert recipe.data.seq_len == 1024
    assert recipe.data.revision == "0123"
    assert load_recipe(write(tmp_path, MINIMAL.replace("1e-3", "5"))).optim.lr == 5.0


def test_text_that_looks_like_a_number_survives_dump(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("seq_len: 64", "seq_len: 64, revision: '12e45'")))
    assert load_recipe(write(tmp_path, dump(recipe), "y.yaml")).data.revision == "12e45"


def test_a_variant_states_only_its_difference(tmp_path: Path) -> None:
    base = MINIMAL.replace("lr: 1e-3", "lr: 1e-3\n  betas: [0.8, 0.9]\n  weight_decay: 0.5")
    write(tmp_path, base, "base.yaml")
    write(tmp_path, "extends: base.yaml\noptim: {betas: [0.7, 0.99]}\n", "middle.yaml")
    recipe = load_recipe(write(tmp_path, "extends: middle.yaml\noptim: {lr: 2}\n", "leaf.yaml"))
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.weight_decay) == (2.0, (0.7, 0.99), 0.5)
    assert recipe.name == "leaf"
    assert recipe.train.steps == 5


def test_circle_missing_base_and_missing_recipe(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    path = write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle: b.yaml -> a.yaml -> b.yaml" in refusal(path)
    path = write(tmp_path, MINIMAL + "extends: gone.yaml\n")
    assert f"{path}:7: extends 'gone.yaml'" in refusal(path)
    assert "did you mean 'qwen3_30b'?" in refusal("qwen3_30bb")


def test_a_bare_name_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny_cpu").name == "tiny_cpu"
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes", MINIMAL.replace("1e-3", "7"), "tiny_cpu.yaml")
    assert load_recipe("tiny_cpu").optim.lr == 7.0


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("  lr: 1e-3", "  lrr: 1e-3", 4, "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("train:", "trian:", 5, "unknown key 'trian'; did you mean 'train'?"),
        ("  lr: 1e-3", "  lr: '1e-3'", 4, "'optim.lr' must be a number, got the text '1e-3'; remove the quotes"),
        ("  lr: 1e-3", "  lr: .nan", 4, "'optim.lr' must be a finite number"),
        ("  lr: 1e-3", "  lr: true", 4, "'optim.lr' must be a number, got true"),
        ("  lr: 1e-3", "  lr: 1\n  lr: 2", 5, "key 'optim.lr' is there twice"),
        ("  lr: 1e-3", "  weight_decay: 0", 3, "missing key 'optim.lr'"),
        ("  steps: 5", "  steps: 5.0", 6, "'train.steps' must be a whole number, got the number 5.0"),
        ("  steps: 5", "  steps: true", 6, "'train.steps' must be a whole number, got true"),
        ("  steps: 5", "  steps: 5\n  deterministic: 1", 7, "'train.deterministic' must be true or false"),
        ("  steps: 5", "  steps: [5", 7, "not valid YAML"),
        ("  steps: 5", "  steps:", 6, "'train.steps' must be a whole number, got nothing (null)"),
        (
            "  lr: 1e-3",
            "  lr: 1\n  name: adam",
            5,
            "must be one of auto, adamw, lean_adamw, flash_adamw, got the text 'adam'",
        ),
        ("  lr: 1e-3", "  lr: 1\n  betas: 0.9", 5, "'optim.betas' must be a list, got the number 0.9"),
        ("  lr: 1e-3", "  lr: 1\n  betas:\n  - 0.9\n  - x", 7, "'optim.betas.1' must be a number, got the text 'x'"),
        ("random_tokens,", "random_tokens, train: a.jsonl,", 2, "'data.train' must be a list"),
        ("random_tokens,", "random_tokens, revision: 123,", 2, "must be text, got the number 123; put quotes round it"),
        ("  lr: 1e-3", "  1: 2\n  lr: 1", 4, "a key must be text"),
        ("optim:\n  lr: 1e-3", "optim:", 3, "'optim' must be a mapping of keys, got nothing"),
        ("  lr: 1e-3", "  lr: !!int abc", 4, "does not fit its tag"),
        ("  lr: 1e-3", "  lr: !python 1", 4, "not valid YAML"),
        ("  lr: 1e-3", "  lr: 1\n  betas: &b [*b]", 5, "contains itself"),
    ],
)
def test_refused_with_file_and_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in MINIMAL
    path = write(tmp_path, MINIMAL.replace(old, new))
    said = refusal(path)
    assert said.startswith(f"{path}:{line}: ")
    assert message in said


def test_an_error_in_the_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, MINIMAL.replace("lr: 1e-3", "lr: x"), "base.yaml")
    leaf = write(tmp_path, "extends: base.yaml\ntrain: {steps: 6}\n", "leaf.yaml")
    assert refusal(leaf).startswith(f"{base}:4: 'optim.lr'")


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_recipe_must_be_a_mapping(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert refusal(path) == f"{path}: a recipe is a mapping of sections (model, data, optim, train, ...)"


def test_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: \xff\n")
    assert "cannot be read" in refusal(str(path))


def test_overrides_win_in_order_and_name_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, ["optim.lr=2e-5", "optim.lr=3e-5", "data.train=[a, b]", "run_dir=null"])
    assert (recipe.optim.lr, recipe.data.train, recipe.run_dir) == (3e-5, ("a", "b"), None)
    nested = load_recipe(path, ["model.config_overrides.rope.theta=1", "model.config_overrides.vocab_size=5"])
    assert nested.model.config_overrides == {"rope.theta": 1, "vocab_size": 5}
    assert refusal(path, "optim.lrr=1") == "--set optim.lrr=1: unknown key 'optim.lrr'; did you mean 'lr'?"
    assert refusal(path, "optim.lr=fast").startswith("--set optim.lr=fast: 'optim.lr' must be a number")
    assert refusal(path, "optim={lrr: 1}").startswith("--set optim={lrr: 1}: unknown key 'optim.lrr'")
    assert refusal(path, "optim.lr=[").startswith("--set optim.lr=[: not valid YAML")
    assert "write it as section.key=value" in refusal(path, "optim.lr")
    assert "write it as section.key=value" in refusal(path, "=3")
    assert "write it as section.key=value" in refusal(path, "optim..lr=3")


def test_recipe_from_dict_is_as_strict_and_changes_nothing(tmp_path: Path) -> None:
    data = recipe_to_dict(load_recipe(write(tmp_path, MINIMAL)))
    changed = recipe_from_dict(data, overrides=("optim.lr=9",))
    assert (changed.optim.lr, data["optim"]["lr"]) == (9.0, 1e-3)
    with pytest.raises(RecipeError, match=r"^r\.json: unknown key 'optim\.lrr'"):
        recipe_from_dict({**data, "optim": {"lr": 1.0, "lrr": 2}}, source="r.json")
    assert isinstance(recipe_from_dict(data), Recipe)


def test_config_launch_plan_and_pictures_import_without_torch() -> None:
    rooms = [ROOT / "moe_recipes" / room for room in ("families", "config", "launch", "plan")]
    files = [path for room in rooms for path in sorted(room.rglob("*.py")) if path.stem != "__init__"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "numpy", "matplotlib", "datasets", "pydantic"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
for name in {[*names, "moe_recipes", "moe_recipes.bench.pictures"]}:
    importlib.import_module(name)
from moe_recipes.launch.cli import main
sys.exit(main(["show", "tiny_cpu"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert len(names) > 60
