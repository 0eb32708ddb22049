"""The arm ``automodel`` of ``moe-recipes bench``: NeMo AutoModel, in an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import RecipeError
from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Recipe

SCRIPT = Path(__file__).with_name("automodel_arm.py")
PROBE = "import importlib.util as u, sys; sys.exit(u.find_spec('nemo_automodel') is None)"


@dataclass(frozen=True, kw_only=True)
class AutoModelPlace:
    """Where AutoModel is installed."""

    python: str
    environment: dict[str, str]
    """Added to this process's: PYTHONPATH, LD_PRELOAD and the like."""

    backend: str
    recompute: bool


def environment_of(words: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` words as a mapping.

    Raises:
        RecipeError: a word is no such pair.
    """
    if wrong := next((word for word in words if not word.partition("=")[0] or "=" not in word), None):
        raise RecipeError(f"--automodel-env {wrong}: give KEY=VALUE")
    return dict(word.split("=", 1) for word in words)


def _python(place: AutoModelPlace) -> list[str]:
    return ["env", *(f"{key}={value}" for key, value in place.environment.items()), place.python]


def missing(recipe: Recipe, place: AutoModelPlace) -> str | None:
    """Why the arm cannot run here; None where it can."""
    if recipe.train.grad_accum_steps != 1:
        return "it steps after each microbatch, the recipe does not: --set train.grad_accum_steps=1"
    try:
        found = subprocess.run([*_python(place), "-c", PROBE], capture_output=True, text=True)
    except OSError as error:
        return f"{place.python}: {error.strerror}"
    if found.returncode not in (0, 1):
        said = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        return f"{place.python}: {said[-1]}"
    return "nemo_automodel is not installed there" if found.returncode else None


def command(recipe: Recipe, place: AutoModelPlace, *, gate: str, steps: int, warmup: int, out: Path) -> list[str]:
    """What one rank of the arm runs. Writes the model's config.json, with the recipe's overrides, for it to read."""
    folder = Path(tempfile.mkdtemp(prefix="moe-recipes-bench-"))
    (folder / "config.json").write_text(json.dumps(read_model_config(recipe.model)[0]))
    words: list[Any] = [*_python(place), SCRIPT, "--model", folder, "--rows", recipe.train.micro_batch_size]
    words += ["--seq-len", recipe.data.seq_len, "--ep-size", recipe.parallel.ep_size, "--gate", gate]
    words += ["--backend", place.backend, "--steps", steps, "--warmup", warmup, "--out", out]
    return [str(word) for word in words] + ["--recompute"] * place.recompute
