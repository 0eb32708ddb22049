"""Learning curves: the arithmetic of the comparison, and both arms for a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_recipes.bench.curves import compare, seconds_to_equal_loss, steps_to, windows

ROOT = Path(__file__).parents[2]


def test_windows_are_means_and_a_rest_is_left_out():
    assert windows([1.0, 3.0, 5.0, 7.0, 100.0], 2) == [2.0, 6.0]


def test_compare_tells_arms_from_seeds():
    flat = {seed: [4.0 + seed / 10] * 4 for seed in (0, 1)}
    raised = {seed: [loss + 0.02 for loss in losses] for seed, losses in flat.items()}
    found = compare({"ours": flat, "transformers": raised}, window=2)
    assert found["between_arms"] == pytest.approx(0.02)
    assert found["between_seeds"] == pytest.approx(0.1)
    assert found["last_window_transformers"] - found["last_window_ours"] == pytest.approx(0.02)


def test_seconds_to_the_loss_that_both_reach():
    fast = [8.0 / step for step in range(1, 101)]
    slow = [8.0 / step**0.5 for step in range(1, 101)]
    assert steps_to(fast, 100.0) == 1
    assert steps_to(fast, 0.0) is None
    found = seconds_to_equal_loss(
        {"ours": {0: fast, 1: fast}, "transformers": {0: slow, 1: slow}}, {"ours": 0.5, "transformers": 2.0}
    )
    assert found["steps"]["transformers"] == 100
    assert found["steps"]["ours"] < 30
    assert found["seconds"] == {
        arm: steps * {"ours": 0.5, "transformers": 2.0}[arm] for arm, steps in found["steps"].items()
    }


SMALL = (
    "model.config_overrides={hidden_size: 64, num_hidden_layers: 2, num_experts: 8, moe_intermediate_size: 32}",
    "data.seq_len=128", "model.dtype=float32", "optim.name=adamw", "train.steps=6",
)  # fmt: skip


def curves(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_recipes.bench.curves", "recipes/curves_1gpu.yaml", "--window", "2"]
    command += ["--out", str(tmp_path / "curves.json"), *words]
    for override in SMALL:
        command += ["--set", override]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_both_arms_learn_the_same_in_float32(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "moe_recipes.data.stdlib_chats", str(tmp_path / "data")], check=True, cwd=ROOT
    )
    data = [f"data.train=[{tmp_path}/data/train.jsonl]", f"model.tokenizer={tmp_path}/data/tokenizer"]
    words = [word for override in data for word in ("--set", override)]
    done = curves(tmp_path, "--seeds", "0,1", "--jobs", "2", "--clock-steps", "2", *words)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "curves.json").read_text())
    for seed in ("0", "1"):
        assert card["curves"]["ours"][seed] == pytest.approx(card["curves"]["transformers"][seed], abs=2e-4)
    assert card["compare"]["between_arms"] < 2e-4 < card["compare"]["between_seeds"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--seeds", "1"), "--seeds 1: give two or more different whole numbers, as in 0,1,2"),
        (("--seeds", "1,x"), "--seeds 1,x: give two or more different whole numbers, as in 0,1,2"),
        (("--set", "train.steps=3"), "train.steps=6: fewer than two windows; set --window lower"),
        (("--set", "parallel.fsdp_size=2"), "curves run on one rank each; set parallel.fsdp_size and ep_size to 1"),
    ],
)
def test_wrong_words_are_one_line(words, line, tmp_path):
    more = ("--window", "4") if "windows" in line else ()
    done = curves(tmp_path, *words, *more)
    assert done.returncode == 64
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
