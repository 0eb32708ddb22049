"""The run folder: what is written, what a resume may change, and what a broken disk says."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_recipes.config.errors import CannotWriteError, CorruptCheckpointError, MissingInputError, RecipeError
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder, prepare_run, run_folder_of

ROOT = Path(__file__).resolve().parents[2]


def recipe_with(*overrides: str) -> Recipe:
    data = {
        "name": "x",
        "model": {"source": "package:tiny_qwen3_moe", "weights": "random"},
        "data": {"format": "random_tokens", "seq_len": 64},
        "optim": {"lr": 1e-5},
        "train": {"steps": 5, "seed": 11},
    }
    return recipe_from_dict(data, overrides=overrides)


def test_prepare_writes_recipe_and_manifest(tmp_path: Path) -> None:
    folder = prepare_run(recipe_with(), RunFolder(tmp_path / "deep" / "run"))
    assert folder.read_recipe() == recipe_with()
    manifest = json.loads(folder.manifest.read_text())
    assert manifest["python"] == platform.python_version()
    assert manifest["packages"]["transformers"] == version("transformers")
    assert manifest["seed"] == 11
    assert manifest["recipe"]["optim"]["lr"] == 1e-5
    assert sorted(item.name for item in folder.path.iterdir()) == ["manifest.json", "recipe.json"]
    folder.update_manifest(data={"rows": 3})
    assert json.loads(folder.manifest.read_text())["data"] == {"rows": 3}


def test_the_manifest_names_the_commit_of_this_code_wherever_it_runs(tmp_path: Path, monkeypatch) -> None:
    foreign = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*foreign, *words], check=True)
    monkeypatch.chdir(tmp_path)
    found = json.loads(prepare_run(recipe_with(), RunFolder("run")).manifest.read_text())["git"]
    if not (ROOT / ".git").exists():
        assert found is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found["commit"] == head.stdout.strip()


def test_a_resume_with_other_code_is_an_event(tmp_path: Path) -> None:
    folder = prepare_run(recipe_with(), RunFolder(tmp_path / "run"))
    folder.metrics.touch()
    prepare_run(recipe_with(), folder)
    assert not folder.events.exists()
    packages = json.loads(folder.manifest.read_text())["packages"]
    folder.update_manifest(packages={**packages, "torch": "2.0"})
    prepare_run(recipe_with(), folder)
    (line,) = folder.events.read_text().splitlines()
    assert json.loads(line)["event"] == "code changed"
    assert json.loads(line)["changes"] == [["packages.torch", "2.0", version("torch")]]


def test_default_place_is_runs_name() -> None:
    assert run_folder_of(recipe_with()).path == Path("runs/x")
    assert run_folder_of(recipe_with("run_dir=elsewhere")).path == Path("elsewhere")


def test_a_resume_may_change_only_what_trains_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    prepare_run(recipe_with(), folder)
    folder.metrics.touch()
    allowed = ["log.every_steps=7", "checkpoint.every_steps=3", "checkpoint.export=false", "run_dir=x"]
    prepare_run(recipe_with(*allowed), folder)
    assert folder.read_recipe().log.every_steps == 7
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert ["log.every_steps", 1, 7] in events[0]["changes"]
    with pytest.raises(RecipeError) as caught:
        prepare_run(recipe_with("optim.lr=2e-5", "train.steps=6", "log.every_steps=1"), folder)
    assert caught.value.exit_code == 64
    assert str(caught.value) == (
        f"{folder.path} was started with optim.lr=1e-05, train.steps=5; the recipe now says optim.lr=2e-05,"
        " train.steps=6; use another run_dir or restore the value"
    )
    assert folder.read_recipe().optim.lr == 1e-5


@pytest.mark.parametrize(
    "override",
    ["model.config_overrides.num_hidden_layers=2", "parallel.fsdp_size=2", "data.seq_len=32", "train.seed=1", "name=y"],
)
def test_everything_else_is_refused_on_resume(tmp_path: Path, override: str) -> None:
    folder = prepare_run(recipe_with(), RunFolder(tmp_path / "run"))
    folder.ckpt.mkdir()
    with pytest.raises(RecipeError, match="use another run_dir"):
        prepare_run(recipe_with(override), folder)


def test_a_start_that_trained_nothing_binds_nothing(tmp_path: Path) -> None:
    folder = prepare_run(recipe_with("optim.lr=0.5"), RunFolder(tmp_path / "run"))
    prepare_run(recipe_with(), folder)
    assert folder.read_recipe() == recipe_with()
    assert json.loads(folder.manifest.read_text())["recipe"]["optim"]["lr"] == 1e-5


def test_unwritable_places_are_73(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="file") as caught:
        prepare_run(recipe_with(), RunFolder(tmp_path / "file" / "run"))
    assert caught.value.exit_code == 73
    with pytest.raises(CannotWriteError):
        prepare_run(recipe_with(), RunFolder("/proc/no/such/run"))


def test_a_damaged_or_absent_recipe(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="is not the folder of a run") as caught:
        RunFolder(tmp_path).read_recipe()
    assert caught.value.exit_code == 66
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(CorruptCheckpointError, match=r"recipe\.json: not valid JSON"):
        prepare_run(recipe_with(), RunFolder(tmp_path))


def test_status_keeps_progress_and_forgets_causes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_status() is None
    folder.write_status("running", step=7, last_durable_step=5)
    folder.write_status("failed", cause="rank 1 was killed", rank=1, host="node9", exit_code=69)
    status = folder.read_status()
    assert status is not None
    assert status.pop("time").endswith("Z")
    assert status == {
        "schema_version": 1,
        "state": "failed",
        "step": 7,
        "last_durable_step": 5,
        "cause": "rank 1 was killed",
        "rank": 1,
        "host": "node9",
        "exit_code": 69,
    }
    folder.write_status("starting")
    status = folder.read_status()
    assert status is not None
    assert (status["step"], status["last_durable_step"], status["cause"]) == (7, 5, None)
    assert os.listdir(tmp_path) == ["status.json"]


def _write_many(path: Path, number: int) -> None:
    for step in range(100):
        RunFolder(path).write_status("running", step=number * 1000 + step, cause="x" * 5000)


def test_readers_never_see_half_a_status(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status("starting", step=0)
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(tmp_path, n)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert json.loads(folder.status.read_bytes())["schema_version"] == 1
    assert [writer.exitcode for writer in writers] == [0, 0]


def test_attempts_are_numbered_and_latest_follows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [folder.new_attempt().name for _ in range(11)] == [str(n) for n in range(1, 12)]
    assert (folder.attempts / "latest").resolve() == (folder.attempts / "11").resolve()
    assert os.readlink(folder.attempts / "latest") == "11"


def test_events_are_lines_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event("save", step=3)
    folder.append_event("stop", signal="SIGTERM")
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [event["event"] for event in events] == ["save", "stop"]
    assert events[1]["signal"] == "SIGTERM"
