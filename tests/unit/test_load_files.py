"""Weight files that are not what their index says: one line that names file, tensor and mend, and the right code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_recipes.config.errors import (
    EXIT_CORRUPT_CHECKPOINT,
    EXIT_MISSING_INPUT,
    EXIT_RECIPE,
    MoeRecipesError,
)
from moe_recipes.models.loading.files import open_weights

INDEX = "model.safetensors.index.json"
FILES = {"a.safetensors": ("x.weight", "y.weight"), "b.safetensors": ("z.weight",)}


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, keys in FILES.items():
        save_file({key: torch.ones(4, 3) for key in keys}, folder / name)
    write_index(folder, {key: name for name, keys in FILES.items() for key in keys})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def look(folder: Path) -> list[str]:
    """All checks of a load on one rank, without a model."""
    with open_weights(folder) as files:
        files.check_present()
        files.check_contents(files.names)
        return files.opened


def cut(folder: Path) -> None:
    os.truncate(folder / "b.safetensors", (folder / "b.safetensors").stat().st_size - 1)


def replace_by_pickle(folder: Path) -> None:
    for name in (*FILES, INDEX):
        (folder / name).unlink()
    torch.save({"x.weight": torch.ones(4, 3)}, folder / "pytorch_model.bin")


def twice(folder: Path) -> None:
    save_file({key: torch.zeros(4, 3) for key in ("z.weight", "x.weight")}, folder / "b.safetensors")


def broken_link(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to("../blobs/1234")


def same_key_in_the_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"x.weight": "a.safetensors", "x.weight": "b.safetensors"}}')


def named(name: str) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, {"x.weight": name})


FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing": (
        lambda folder: (folder / "b.safetensors").unlink(),
        EXIT_MISSING_INPUT, "/b.safetensors: not there (2 weight files expected); fetch the model again",
    ),
    "broken link": (broken_link, EXIT_MISSING_INPUT, "it is a link to ../blobs/1234, which is not there"),
    "a folder": (
        lambda folder: ((folder / "b.safetensors").unlink(), (folder / "b.safetensors").mkdir()),
        EXIT_MISSING_INPUT, "/b.safetensors: not there (2 weight files",
    ),
    "empty": (
        lambda folder: (folder / "b.safetensors").write_bytes(b""),
        EXIT_CORRUPT_CHECKPOINT, "/b.safetensors: empty; fetch the file again",
    ),
    "cut": (cut, EXIT_CORRUPT_CHECKPOINT, "/b.safetensors: cut short or not safetensors (the file has"),
    "no safetensors": (
        lambda folder: (folder / "b.safetensors").write_text("<html>404</html>" * 99),
        EXIT_CORRUPT_CHECKPOINT, "/b.safetensors: cut short or not safetensors (no safetensors header in",
    ),
    "foreign": (
        lambda folder: save_file({"other.weight": torch.ones(2)}, folder / "b.safetensors"),
        EXIT_CORRUPT_CHECKPOINT, f"/b.safetensors: lacks the tensor z.weight, which {INDEX} puts there",
    ),
    "two files": (twice, EXIT_CORRUPT_CHECKPOINT, "/b.safetensors: the tensor x.weight is in a.safetensors too"),
    "absolute": (named("/etc/passwd"), EXIT_CORRUPT_CHECKPOINT, "file name '/etc/passwd' leaves the model folder"),
    "parent": (named("../b.safetensors"), EXIT_CORRUPT_CHECKPOINT, "'../b.safetensors' leaves the model folder"),
    "dots": (named(".."), EXIT_CORRUPT_CHECKPOINT, "file name '..' leaves the model folder; do not trust this model"),
    "no file name": (
        lambda folder: write_index(folder, {"x.weight": 7}), EXIT_CORRUPT_CHECKPOINT, "names something that is no file",
    ),
    "no map": (lambda folder: write_index(folder, {}), EXIT_CORRUPT_CHECKPOINT, "its weight_map is empty"),
    "no JSON": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": '), EXIT_CORRUPT_CHECKPOINT,
        f"/{INDEX}: not a safetensors index (Expecting value",
    ),
    "a key twice": (same_key_in_the_index, EXIT_CORRUPT_CHECKPOINT, "(it names 'x.weight' twice); fetch"),
    "pickle": (replace_by_pickle, EXIT_RECIPE, "/pytorch_model.bin: pickled weights, which can run any code"),
    "nothing": (
        lambda folder: [(folder / name).unlink() for name in (*FILES, INDEX)],
        EXIT_MISSING_INPUT, "/model.safetensors: not there (1 weight files expected); fetch the model again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_line(tmp_path: Path, fault: str) -> None:
    spoil, exit_code, message = FAULTS[fault]
    folder = write_folder(tmp_path / "model")
    spoil(folder)
    with pytest.raises(MoeRecipesError) as caught:
        look(folder)
    assert message in str(caught.value)
    assert caught.value.exit_code == exit_code
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_right_pass_and_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    assert look(folder) == sorted(FILES)
    (tmp_path / "blobs").mkdir()
    (folder / "b.safetensors").rename(tmp_path / "blobs" / "1234")
    (folder / "b.safetensors").symlink_to("../blobs/1234")
    assert look(folder) == sorted(FILES)


def test_a_file_of_which_nothing_is_asked_is_not_opened(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    cut(folder)
    with open_weights(folder) as files:
        files.check_present()
        assert files.place("x.weight").shape == (4, 3)
        assert files.opened == ["a.safetensors"]


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    assert dict(open_weights(tmp_path).weight_map) == {"x.weight": "model.safetensors"}
    os.truncate(tmp_path / "model.safetensors", 20)
    with pytest.raises(MoeRecipesError, match=r"model.safetensors: cut short or not safetensors") as caught:
        open_weights(tmp_path)
    assert caught.value.exit_code == EXIT_CORRUPT_CHECKPOINT


def test_a_single_file_beside_an_index_of_other_files_is_refused(tmp_path: Path) -> None:
    """Transformers reads the one, other programs the other."""
    folder = write_folder(tmp_path / "model")
    save_file({"x.weight": torch.zeros(4, 3)}, folder / "model.safetensors")
    with pytest.raises(MoeRecipesError, match="which names other files") as caught:
        look(folder)
    assert caught.value.exit_code == EXIT_CORRUPT_CHECKPOINT
