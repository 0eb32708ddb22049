"""The command line as a user calls it: output, exit codes, one line an error."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moe_recipes
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder, prepare_run
from moe_recipes.launch.cli import VERBS, main, make_parser
from moe_recipes.launch.train import started_rank

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "SLURM_PROCID")}


def call(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_recipes.launch.cli", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**CLEAN, "PYTHONPATH": str(ROOT), **environment},
    )


def refused(code: int, *words: str, **environment: str) -> str:
    done = call(*words, **environment)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.startswith("moe-recipes: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_show_prints_the_recipe_and_what_follows() -> None:
    done = call("show", "recipes/qwen3_30b_2gpu.yaml", "--set", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == recipe_to_dict(load_recipe("qwen3_30b_2gpu", ["train.steps=3"]))
    facts = dict(line[2:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("# ") and ": " in line)
    assert facts["ranks"].strip() == "2"
    assert facts["tokens a step"].strip() == "32,768"
    assert facts["tokens in the run"].strip() == "98,304"


def test_show_in_json_and_an_unfetched_model_is_said() -> None:
    done = call("show", "qwen3_30b", "--json", HF_HUB_CACHE="/no/such/cache")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["recipe"] == recipe_to_dict(load_recipe("qwen3_30b"))
    assert answer["derived"]["ranks"] == 8
    assert "hf download Qwen/Qwen3-30B-A3B" in answer["derived"]["model"]
    assert answer["derived"]["parameters"] == 30_532_122_624, "as Transformers counts this model on the meta device"
    foreign = call("show", "qwen3_30b", "--json", "--set", "model.source=some/model", HF_HUB_CACHE="/no/such/cache")
    assert "hf download some/model" in json.loads(foreign.stdout)["derived"]["parameters"]


def test_version_and_help() -> None:
    done = call("--version")
    assert (done.returncode, done.stdout) == (0, f"moe-recipes {moe_recipes.__version__}\n")
    assert call("train", "--help").returncode == 0


def test_usage_errors_are_64_not_2() -> None:
    assert "required" in refused(64)
    assert "invalid choice: 'tran'" in refused(64, "tran", "x.yaml")
    assert "unrecognized arguments: --sets" in refused(64, "show", "tiny_cpu", "--sets", "a=b")
    assert "did you mean 'tiny_cpu'?" in refused(64, "show", "tiny_cpuu")


def test_each_kind_of_error_has_its_code(tmp_path: Path) -> None:
    where = ["--set", f"run_dir={tmp_path}/run"]
    assert "--set optim.lrr=1" in refused(64, "train", "tiny_cpu", *where, "--set", "optim.lrr=1")
    assert "must divide the 8 experts" in refused(
        64, "train", "tiny_cpu", *where, "--set", "parallel.fsdp_size=3", "--set", "parallel.ep_size=3"
    )
    assert "hf download" in refused(66, "train", "qwen3_30b", *where, HF_HUB_CACHE="/no/such/cache")
    assert not (tmp_path / "run").exists()
    assert "cannot be written" in refused(73, "train", "tiny_cpu", "--set", "run_dir=/proc/no")
    assert "is not the folder of a run" in refused(66, "export", str(tmp_path))


def test_cpu_hides_the_gpus_from_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert main(["export", str(tmp_path)]) == 66
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert main(["export", str(tmp_path), "--cpu"]) == 66
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_errors_in_json() -> None:
    done = call("train", "tiny_cpu", "--json", "--set", "optim.lr=fast")
    assert done.returncode == 64
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 64
    assert answer["error"].startswith("--set optim.lr=fast: 'optim.lr' must be a number")
    assert json.loads(call("shwo", "--json").stdout)["exit_code"] == 64


def test_a_changed_recipe_does_not_resume(tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path}/run"
    prepare_run(load_recipe("tiny_cpu", [run_dir]), RunFolder(tmp_path / "run")).metrics.touch()
    said = refused(64, "train", "tiny_cpu", "--set", run_dir, "--set", "optim.lr=0.5")
    assert "was started with optim.lr=0.003; the recipe now says optim.lr=0.5" in said
    other_rank = {"RANK": "1", "WORLD_SIZE": "2"}
    assert refused(64, "train", "tiny_cpu", "--set", run_dir, "--set", "optim.lr=0.5", **other_rank) == said


def test_what_a_rank_met_is_the_error_in_json(tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path}/run", "data.format=random_tokens", "data.train=[]", "data.validation_fraction=0"]
    overrides += ["train.validate_every_steps=0", "kernels.experts=nothing"]
    done = call("train", "tiny_cpu", "--cpu", "--json", *(word for key in overrides for word in ("--set", key)))
    answer = json.loads(done.stdout)
    assert done.returncode == answer["exit_code"] == answer["status"]["exit_code"] == 64
    assert "kernels.experts=nothing" in answer["error"]
    assert f"error: {answer['error']}; log: " in done.stderr


def test_ranks_that_others_started_must_be_as_many_as_the_recipe_has(tmp_path: Path) -> None:
    where = ["--set", f"run_dir={tmp_path}/run"]
    assert "WORLD_SIZE=3, but the recipe has" in refused(64, "train", "tiny_cpu", *where, RANK="0", WORLD_SIZE="3")
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "4"}
    assert "SLURM_STEP_NUM_TASKS=4" in refused(64, "train", "tiny_cpu", *where, **slurm)
    assert not (tmp_path / "run").exists()


def test_ranks_are_found_in_the_environment() -> None:
    assert started_rank({}, 2) is None
    assert started_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 2) is None  # a batch script, not a step of it
    assert started_rank({"RANK": "1", "WORLD_SIZE": "2"}, 2) == 1
    assert started_rank({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, 2) == 1


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m moe_recipes.launch.cli show tiny_cpu | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env={**CLEAN, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_verb_explains_itself_and_only_the_chosen_one_is_imported() -> None:
    said = call("--help").stdout
    assert [name for name in VERBS if not re.search(rf"^ +{name}\b", said, re.MULTILINE)] == []
    code = (
        "import importlib, sys; from moe_recipes.launch.cli import VERBS, main\n"
        "main(['show', 'tiny_cpu', '--json'])\n"
        "loaded = [v.module for n, v in VERBS.items() if n != 'show' and v.module in sys.modules]\n"
        "heavy = {'torch', 'transformers', 'submitit', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{loaded} {heavy}' if loaded or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=CLEAN, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name in VERBS:
        parser = make_parser(name)
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([name, "--help"])
        assert ended.value.code == 0, name
