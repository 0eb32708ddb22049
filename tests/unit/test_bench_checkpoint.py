"""The measurement of saves: its numbers fit each other, it leaves nothing, and it refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_recipes.bench import checkpoint
from moe_recipes.config.errors import CannotWriteError, RecipeError


def test_the_figures_fit_each_other_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TENSOR_BYTES", 2**20)
    found = checkpoint.measure(tmp_path / "new", 4 * 2**20, repeats=3)
    assert found["bytes"] == 4 * 2**20
    assert list(tmp_path.iterdir()) == []
    assert {len(times) for times in found["all"].values()} == {3}
    assert found["background_s"] > found["blocking_s"] > 0
    assert found["save_gb_per_s"] == pytest.approx(found["bytes"] / 1e9 / sorted(found["all"]["at_once_s"])[1])
    assert found["blocking_over_bare_copy"] == pytest.approx(found["blocking_s"] / found["bare_copy_s"])


def test_a_folder_that_is_there_and_memory_that_is_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError, match="is there"):
        checkpoint.measure(tmp_path, 2**20, repeats=1)
    with pytest.raises(RecipeError, match="do not fit into host memory"):
        checkpoint.measure(tmp_path / "new", 2**50, repeats=1)
    assert list(tmp_path.iterdir()) == []
