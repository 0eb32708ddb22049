"""What `moe-recipes bench` makes of its arms: what fits, what failed, what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.bench.__main__ import failure
from moe_recipes.bench.sweep import largest, largest_rows, longest_sequence
from moe_recipes.config.errors import InfrastructureError
from moe_recipes.config.resolve import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe(str(ROOT / "recipes" / "qwen3_30b_2gpu.yaml"), [])
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize("truth", range(65))
def test_largest_finds_the_border_and_never_tries_twice(truth):
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= truth

    assert largest(fits, limit=64) == truth
    assert len(tried) == len(set(tried)) <= 13


def test_a_sweep_changes_rows_or_the_sequence_of_one_row():
    seen = []

    def measure(recipe):
        rows, tokens = recipe.train.micro_batch_size, recipe.data.seq_len
        seen.append((rows, tokens))
        return {"arm": "ours"} if rows * tokens <= 5 * 4096 else {"arm": "ours", "failed": OOM}

    assert largest_rows(RECIPE, measure) == 5
    assert {tokens for _, tokens in seen} == {4096}
    seen.clear()
    assert longest_sequence(RECIPE, measure) == 5 * 4096
    assert {rows for rows, _ in seen} == {1}


@pytest.mark.parametrize("result", [{"failed": "ValueError: no such key"}, {"missing": "nemo_automodel is not there"}])
def test_a_sweep_ends_at_a_failure_that_says_nothing_of_size(result):
    with pytest.raises(InfrastructureError, match="--sweep: ours does not run: "):
        largest_rows(RECIPE, lambda recipe: {"arm": "ours", **result})


def test_the_reason_of_a_failure_is_the_line_that_names_it():
    first = f"Traceback ...\n[rank0]: {OOM}\n  _warn_once(\n"
    second = "RuntimeError: NCCL communicator was aborted\n"
    assert failure([first]) == f"[rank0]: {OOM}"
    assert failure([second, first]) == f"[rank0]: {OOM}"
    assert failure([second, ""]) == second.strip()
    assert failure(["all went well\n"]) is None


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_recipes.bench", str(ROOT / "recipes" / "qwen3_30b_2gpu.yaml"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_an_arm_that_is_not_installed_is_in_the_file_as_missing(tmp_path):
    done = bench("--arms", "automodel", "--gates", "real", "--out", "card.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "card.json").read_text())["results"]
    assert result["missing"] == "nemo_automodel is not installed there"
    assert "missing: nemo_automodel is not installed there" in done.stdout


def test_an_arm_without_accumulation_is_not_held_against_one_with_it(tmp_path):
    """Four microbatches a step pay for one optimizer step; the rival's arm would pay after each."""
    words = ("--arms", "automodel", "--gates", "real", "--set", "train.grad_accum_steps=4", "--out", "card.json")
    done = bench(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "card.json").read_text())["results"]
    assert result["missing"].endswith("--set train.grad_accum_steps=1")


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("--arms", "ours,nemo"), 64, "--arms nemo: must be of ours, transformers, automodel"),
        (("--gates", "fake"), 64, "--gates fake: must be of real, balanced"),
        (("--arms", "automodel", "--automodel-env", "PYTHONPATH"), 64, "--automodel-env PYTHONPATH: give KEY=VALUE"),
        (("--arms", "automodel", "--automodel-env", "=x"), 64, "--automodel-env =x: give KEY=VALUE"),
        (
            ("--arms", "ours", "--ep-sizes", "3"),
            64,
            "parallel.ep_size=3 must divide parallel.fsdp_size=2: the ranks that hold distinct experts are some of"
            " those that shard the dense parameters",
        ),
        (("--out", "nowhere/card.json"), 69, "--out nowhere/card.json: the folder is not there"),
        (("--batches", "1,two"), 64, "--batches two: give whole numbers from 1 on, as in 1,2,4"),
        (("--ep-sizes", "0"), 64, "--ep-sizes 0: give whole numbers from 1 on, as in 1,2,4"),
        (("--steps", "0"), 64, "--steps 0 --warmup 3: time at least 1 step, after 0 or more"),
    ],
)
def test_wrong_words_are_one_line(words, code, line, tmp_path):
    done = bench(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (code, f"moe-recipes: error: {line}")


def test_a_host_without_gpus_does_not_build_a_model_larger_than_its_memory(tmp_path, monkeypatch):
    """100 times the layers of the published model: 3 T parameters of 8 bytes."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    done = bench(
        "--arms", "ours", "--gates", "real", "--set", "model.config_overrides={num_hidden_layers: 4800}", cwd=tmp_path
    )
    assert done.returncode == 78, done.stderr
    line = r"moe-recipes: error: no GPU here, and the 2\d,\d{3} GiB of states of qwen3_30b_2gpu do not fit into the .*"
    assert re.fullmatch(line, done.stderr.strip())
    assert not list(tmp_path.iterdir())
