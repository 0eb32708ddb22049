"""The recipe of every published model, laid out whole on the meta device as a sample of its ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.config.model_config import PACKAGED
from moe_recipes.config.resolve import load_recipe
from moe_recipes.families import PUBLISHED, Published
from moe_recipes.plan.parameters import count_parameters
from moe_recipes.plan.states import device_bytes
from tests.unit.test_house import table_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED.values(), ids=lambda model: model.recipe)
def test_every_published_model_passes_the_rehearsal_of_its_recipe(model: Published, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moe_recipes.launch.cli", "rehearse", model.recipe]
    done = subprocess.run(
        [*words, "--set", f"run_dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run-rehearsal" / "rehearse.json").read_bytes())
    recipe = load_recipe(model.recipe)
    count = count_parameters(json.loads((PACKAGED / model.packaged / "config.json").read_bytes()))
    assert count is not None
    assert (record["verdict"], record["num_ranks"]) == ("PASS", recipe.parallel.num_ranks)
    assert record["num_parameters"] == count.trained
    fullest = max(r["parameter_bytes"] + r["gradient_bytes"] + r["optimizer_bytes"] for r in record["ranks"])
    arithmetic = device_bytes(count, recipe)
    assert arithmetic is not None
    # Small tensors keep float32 moments, and so do rows that are no multiple of a block of 8-bit codes.
    assert arithmetic <= fullest < 1.07 * arithmetic
    said = {row[0]: row[5] for row in table_of(ROOT / "docs" / "models.md", "| model | ")}
    assert said[model.name] == f"{arithmetic / 2**30:.1f} / {fullest / 2**30:.1f}"
