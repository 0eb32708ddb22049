"""``moe-recipes prove``: right code passes on every layout, and each of twelve faults ends with 17 and is named."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_recipes.config.recipe import Data, Model, Optim, Recipe, Train
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.launch.prove import proof_recipe
from moe_recipes.prove import __main__ as prove_main
from moe_recipes.prove.task import Layout
from tests.ranks.injections import INJECTIONS
from tests.ranks.launch import run_on_ranks
from tests.tiny_models import save_tiny_model, tiny_config

ROOT = Path(__file__).resolve().parents[2]
ALL_NAMES = {
    "logits", "document isolation", "loss", "gradient norm", "gradients", "weights after the step", "frozen buffers",
    "tokens of every expert", "saved tensors", "exported keys", "exported weights",
}  # fmt: skip


def recipe_of(family: str, folder: Path, **train: float) -> Recipe:
    tiny_config(family).save_pretrained(folder / family)
    return Recipe(
        name=family,
        run_dir=str(folder / "run"),
        model=Model(source=str(folder / family), dtype="float32", weights="random"),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1, **train),
    )


def prove_in_a_fork(fault: str | None, recipe: Recipe, folder: Path) -> tuple[int, dict, str]:
    """Exit code, ``prove.json`` and report of a proof of one layout, in a process that the fault is put into."""

    def child() -> None:
        if fault is not None:
            INJECTIONS[fault]()
        prove_main.layouts = lambda expert_parallel, replicas: (Layout(num_ranks=4, ep_size=1 + expert_parallel),)
        words = [str(folder / "proof"), "--recipe-json", json.dumps(recipe_to_dict(proof_recipe(recipe)[0]))]
        os._exit(prove_main.main(words))

    process = mp.get_context("fork").Process(target=child)
    process.start()
    process.join(200)
    code = process.exitcode
    if process.is_alive():
        process.kill()
    assert code is not None
    record = json.loads((folder / "proof" / "prove.json").read_bytes())
    return code, record, (folder / "proof" / "report.txt").read_text()


def failures(record: dict) -> dict[str, str]:
    """Failed comparisons, and what each says."""
    return {check["name"]: check["found"] for check in record["layouts"][0]["checks"] if not check["passed"]}


FAULTS = {
    "clip_norm_per_ep_group": ("qwen3_moe", {}, {"gradient norm"}, "reference"),
    "lost_router_gradient": ("qwen3_moe", {}, {"gradients"}, "gate.weight"),
    "aux_loss_without_gradient": ("qwen3_moe", {"router_aux_loss_coef": 0.02}, {"gradients"}, "gate.weight"),
    "expert_gradients_off_by_ep": ("qwen3_moe", {}, {"gradients", "gradient norm"}, ".experts."),
    "experts_of_one_rank_saved": ("qwen3_moe", {}, {"saved tensors"}, ".experts."),
    "transposed_down_proj": ("qwen3_moe", {}, {"exported weights"}, "down_proj"),
    "leaking_mamba_state": ("nemotron_h", {}, {"document isolation", "logits", "loss"}, "other documents"),
    "drifting_frozen_bias": ("deepseek_v3", {}, {"frozen buffers"}, "e_score_correction_bias"),
    "clamped_time_step": ("nemotron_h", {}, {"logits", "loss"}, ""),
    "dropped_tokens": ("gpt_oss", {}, {"logits", "loss", "gradients"}, ""),
    "leaking_mtp_shift": ("nemotron_h_mtp", {}, {"MTP loss", "MTP document isolation", "gradients"}, "other documents"),
    "mtp_lost_on_export": ("nemotron_h_mtp", {}, {"exported keys"}, "mtp.layers.0."),
}
"""Family, keys of ``train``, comparisons that must fail, and a word of what the report must name."""

FAST = ("transposed_down_proj", "lost_router_gradient")


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault in FAST else pytest.mark.slow) for fault in FAULTS]
)
def test_a_fault_is_found_and_named(fault: str, tmp_path: Path) -> None:
    family, train, must_fail, named = FAULTS[fault]
    code, record, report = prove_in_a_fork(fault, recipe_of(family, tmp_path, **train), tmp_path)
    failed = failures(record)
    assert code == 17, report
    assert record["verdict"] == "FAIL"
    assert must_fail <= failed.keys(), report
    assert any(named in found for found in failed.values()), report
    assert all(name in report for name in failed)


def test_every_fault_of_the_list_is_tried() -> None:
    assert FAULTS.keys() == INJECTIONS.keys()
    assert len(FAULTS) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("qwen3_moe", {"router_aux_loss_coef": 0.02, "activation_checkpointing": "none"}),
        ("deepseek_v3", {}),
        ("gpt_oss", {}),
        ("nemotron_h", {}),
        ("llama", {}),
        ("deepseek_v3_mtp", {}),
        ("nemotron_h_mtp", {}),
        ("nemotron_h_mtp", {"mtp_loss_coef": 0.0}),
    ],
)
def test_right_code_passes(family: str, train: dict, tmp_path: Path) -> None:
    code, record, report = prove_in_a_fork(None, recipe_of(family, tmp_path, **train), tmp_path)
    assert code == 0, report
    assert record["model"]["packed"], record["notes"]
    names = {check["name"] for check in record["layouts"][0]["checks"]}
    assert names >= ALL_NAMES
    assert ("load-balancing loss" in names) == ("router_aux_loss_coef" in train)
    trains_mtp = family.endswith("_mtp") and not train
    assert ("MTP loss" in names) == ("MTP document isolation" in names) == trains_mtp
    assert all(check["passed"] for check in record["layouts"][0]["checks"])


def prove(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_recipes.launch.cli", "prove", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny_cpu", "nemotron_ultra_550b"])
def test_the_command_on_1_2_4_and_8_ranks(recipe: str, tmp_path: Path) -> None:
    start = time.monotonic()
    done = prove(recipe, "--set", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 240
    record = json.loads((tmp_path / "run-proof" / "prove.json").read_bytes())
    assert [layout["num_ranks"] for layout in record["layouts"]] == [1, 2, 4, 8]
    assert "PASS" in done.stdout
    assert done.stdout.count("ok   document isolation") == 4


def test_a_model_that_is_not_here_is_one_line() -> None:
    done = prove("nothing_of_that_name")
    assert done.returncode == 64
    assert done.stderr.startswith("moe-recipes: error: no recipe 'nothing_of_that_name'")
    assert "Traceback" not in done.stderr


def test_a_folder_without_a_config_is_one_line(tmp_path: Path) -> None:
    done = prove(str(tmp_path))
    assert done.returncode == 66
    assert done.stderr == (
        f"moe-recipes: error: {tmp_path}: the folder holds no config.json; name a recipe, or a model's folder\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 2}, "has no causal language model for it"),
        ({"model_type": "qwen3_moe", "num_hidden_layers": 2}, "lower that width by model.config_overrides"),
    ],
)
def test_a_config_that_cannot_be_proved_is_one_line(config: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    done = prove(str(tmp_path / "own"), cwd=tmp_path)
    assert done.returncode == 64
    assert done.stderr.startswith(f"moe-recipes: error: model_type '{config['model_type']}'")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_folder_with_weights_of_ones_own(tmp_path: Path) -> None:
    run_on_ranks(save_tiny_model, 1, "deepseek_v3_mtp", tmp_path / "own")
    done = prove(str(tmp_path / "own"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok   MTP document isolation") == 4


def test_a_small_model_keeps_what_its_family_is() -> None:
    proof, notes = proof_recipe(load_recipe(str(ROOT / "recipes" / "nemotron_ultra_550b.yaml")))
    cut = proof.model.config_overrides
    assert cut["layers_block_type"] == ["mamba", "moe", "attention"]
    assert (cut["n_routed_experts"], cut["num_experts_per_tok"], cut["moe_latent_size"]) == (8, 2, 32)
    assert (proof.model.dtype, proof.optim.name) == ("float32", "lean_adamw")
    assert all("MTP" in note or "switched off" in note for note in notes)
