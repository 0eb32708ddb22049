"""A backend that Transformers refuses is the recipe's error, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_recipes.config.errors import RecipeError
from moe_recipes.config.recipe import Data, Kernels, Model, Optim, Recipe, Train
from moe_recipes.models.build import build_model, read_source
from tests.ranks.launch import run_on_ranks
from tests.tiny_models import save_tiny_model, tiny_config

CHOICES = [
    ("qwen3_moe", "flash", "moe_recipes", r"^model\.attn_implementation=flash: .*flash"),
    ("qwen3_moe", "flash_attention_2", "moe_recipes", r"^model\.attn_implementation=flash_attention_2: "),
    ("qwen3_moe", "sdpa", "fast", r"^kernels\.experts=fast: .*fast.*; set kernels\.experts: moe_recipes"),
]


def check_refusal(folder: Path, attention: str, experts: str, message: str, weights: str) -> None:
    recipe = Recipe(
        name="refused",
        model=Model(source=str(folder), weights=weights, dtype="float32", attn_implementation=attention),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
        kernels=Kernels(experts=experts),
    )
    with pytest.raises(RecipeError, match=message) as caught:
        build_model(recipe, read_source(recipe), scratch=folder / "scratch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "attention", "experts", "message"), CHOICES)
def test_a_refused_backend_names_its_key(tmp_path, family, attention, experts, message):
    tiny_config(family).save_pretrained(tmp_path / "config")
    run_on_ranks(check_refusal, 1, tmp_path / "config", attention, experts, message, "random")
    run_on_ranks(save_tiny_model, 1, family, tmp_path / "model")
    run_on_ranks(check_refusal, 1, tmp_path / "model", attention, experts, message, "pretrained")
