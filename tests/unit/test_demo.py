"""The demo's own checks: a curve with a gap, a repeat or no fall must not pass."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from moe_recipes.config.errors import CannotWriteError, NotFiniteError
from moe_recipes.config.resolve import load_recipe
from moe_recipes.config.run_folder import RunFolder, prepare_run
from moe_recipes.launch import demo


def write(path: Path, steps: list[int], losses: list[float]) -> Path:
    path.write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in zip(steps, losses, strict=True)))
    return path


def test_a_joined_falling_curve_passes(tmp_path: Path) -> None:
    metrics = write(tmp_path / "m", list(range(1, 41)), [8.0] * 20 + [3.0] * 20)
    assert demo.check_curve(metrics, num_steps=40) == (8.0, 3.0)


@pytest.mark.parametrize(
    "steps", [[*range(1, 20), *range(21, 41)], [*range(1, 41), 40], [*range(2, 41), 1], [*range(1, 42)]]
)
def test_a_gap_a_repeat_a_swap_or_too_many_fail(tmp_path: Path, steps: list[int]) -> None:
    metrics = write(tmp_path / "m", steps, [8.0] * 20 + [3.0] * (len(steps) - 20))
    with pytest.raises(NotFiniteError, match="steps 1 to 40 once each"):
        demo.check_curve(metrics, num_steps=40)


@pytest.mark.parametrize("last", [7.0, 9.0, float("nan")])
def test_no_fall_fails(tmp_path: Path, last: float) -> None:
    metrics = write(tmp_path / "m", list(range(1, 41)), [8.0] * 20 + [last] * 20)
    with pytest.raises(NotFiniteError, match="a fall of less than"):
        demo.check_curve(metrics, num_steps=40)


def test_only_our_own_runs_are_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    demo.remove_old_run(folder)
    folder.path.mkdir()
    (folder.path / "thesis.txt").write_text("years of work")
    with pytest.raises(CannotWriteError, match="is no run of moe-recipes"):
        demo.remove_old_run(folder)
    assert (folder.path / "thesis.txt").exists()
    prepare_run(load_recipe("tiny_cpu"), folder)
    demo.remove_old_run(folder)
    assert not folder.path.exists()


def test_every_host_trains_the_same_rows_a_step() -> None:
    rows = set()
    for num_gpus in (0, 1, 2, 8):
        options = demo.layout_options(num_gpus, cpu=False)
        overrides = [word for flag, word in pairwise(options) if flag == "--set"]
        recipe = load_recipe(demo.RECIPE, overrides)
        rows.add(recipe.rows_per_step)
        assert recipe.parallel.num_ranks <= max(num_gpus, 2)
    assert len(rows) == 1
    assert demo.layout_options(8, cpu=True) == ["--cpu"]


TRAINER = """
import json, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with open(sys.argv[1], "a") as file:
    for step in range(1, int(sys.argv[3]) + 1):
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\\n")
        file.flush()
        time.sleep(0.05)
        if stop:
            sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("code", "steps", "said"), [(75, 1000, None), (0, 1000, "not with 75"), (75, 3, "before step 5")]
)
def test_training_is_stopped_half_way_and_must_say_75(tmp_path: Path, code: int, steps: int, said: str | None) -> None:
    (tmp_path / "trainer.py").write_text(TRAINER)
    words = [str(tmp_path / "trainer.py"), str(tmp_path / "m"), str(code), str(steps)]
    if said is None:
        demo.train_until(words, tmp_path / "m", stop_step=5)
        assert 5 <= max(demo.steps_done(tmp_path / "m")) < 50
    else:
        with pytest.raises(demo.ChildFailed, match=said):
            demo.train_until(words, tmp_path / "m", stop_step=5)


def test_a_line_that_is_being_written_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert demo.steps_done(tmp_path / "m") == [1, 2]
    assert demo.steps_done(tmp_path / "gone") == []
