"""``moe-recipes ckpt``: what it lists, finds damaged, deletes, compares; and that most needs no torch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from moe_recipes.checkpoint.__main__ import main
from moe_recipes.checkpoint.diff import compare
from moe_recipes.checkpoint.store import prune_checkpoints
from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.runtime.safetensors_header import read_header
from moe_recipes.runtime.sharding import Rows
from tests.unit.checkpoint_samples import Entry, sample, save, save_from_two, shard, whole
from tests.unit.operator_runs import call, refused, write_event, written_run

LOSSES = {1: 0.9, 2: 0.4, 4: float("nan"), 5: 0.7}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Five checkpoints; 2 is the best, 1 is pinned."""
    folder = written_run(tmp_path / "runs" / "a")
    for step in range(1, 6):
        loss = {"validation_loss": LOSSES[step]} if step in LOSSES else {}
        save(folder.ckpt, step, state={"step": step, **loss})
    (folder.ckpt / "step-00000001" / "PINNED").touch()
    return folder


def asked(run: RunFolder, action: str, name: str | None = None, **more) -> dict:
    words = {"action": action, "ckpt_dir": str(run.ckpt), "name": name, "json": True, "hash": False, "yes": False}
    return {**words, "undo": False, "keep_last": 1, "keep_best": 1, "resumed": [], **more}


def names(run: RunFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.ckpt.iterdir() if path.name.startswith("step-"))


def test_ls_says_step_state_size_and_labels(run: RunFolder, capsys) -> None:
    shard(run.ckpt / "step-00000004").unlink()
    assert main(asked(run, "ls")) == 0
    rows = {row["step"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [5, 4, 3, 2, 1]
    labels = {step: row["labels"] for step, row in rows.items() if row["labels"]}
    assert labels == {5: ["latest"], 2: ["best"], 1: ["pinned"]}
    assert [step for step, row in rows.items() if row["state"] == "damaged"] == [4]
    assert "rank-00000.safetensors: No such file" in rows[4]["problems"][0]
    assert rows[5]["bytes"] == sum(path.stat().st_size for path in (run.ckpt / "step-00000005").iterdir())
    assert rows[2]["validation_loss"] == 0.4
    assert 0 <= rows[5]["age_s"] < 600


def swap_rows(path: Path, name: str, row_bytes: int) -> None:
    """Exchange the first two rows of a tensor on disk: as if two experts had changed places."""
    with open(shard(path), "r+b") as file:
        offset = read_header(file.fileno()).spans[name].offset
        first, second = (os.pread(file.fileno(), row_bytes, offset + row * row_bytes) for row in (0, 1))
        assert first != second
        os.pwrite(file.fileno(), second + first, offset)


def flip(path: Path, name: str) -> None:
    with open(shard(path), "r+b") as file:
        span = read_header(file.fileno()).spans[name]
        place = span.offset + span.num_bytes // 2
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, place)[0] ^ 16]), place)


DAMAGE = {
    "flipped byte": (lambda path: flip(path, "optim.rest"), "tensor 'optim.rest'", False),
    "swapped expert": (lambda path: swap_rows(path, "model.weight", 6), "tensor 'model.weight'", False),
    "truncated shard": (lambda path: os.truncate(shard(path), 99), "99 bytes instead of", True),
    "deleted shard": (lambda path: shard(path).unlink(), "No such file", True),
    "another checkpoint's shard": (
        lambda path: shutil.copy(shard(path.parent / "step-00000003"), shard(path)),
        "tensor 'model.weight' have changed",
        False,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_the_file_and_the_tensor(run: RunFolder, capsys, damage: str) -> None:
    act, words, seen_by_size = DAMAGE[damage]
    path = run.ckpt / "step-00000005"
    act(path)
    for hashes in (False, True):
        code = main(asked(run, "verify", hash=hashes))
        report = json.loads(capsys.readouterr().out)
        problems = {name: found["problems"] for name, found in report.items() if found["problems"]}
        if hashes or seen_by_size:
            assert code == 74
            assert list(problems) == [path.name]
            assert any(f"{shard(path)}: " in problem and words in problem for problem in problems[path.name]), problems
        else:
            assert (code, problems) == (0, {})
    with pytest.raises(CorruptCheckpointError, match="step-00000005 damaged"):
        main(asked(run, "verify", hash=True, json=False))
    assert main(asked(run, "verify", "step-00000003", hash=True)) == 0


def test_prune_says_first_and_keeps_last_best_pinned_latest_and_resumed(run: RunFolder, capsys) -> None:
    (run.ckpt / "step-00000006.tmp-abc").mkdir()
    rules = {"resumed": [3]}
    assert main(asked(run, "prune", **rules)) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": [], "stale": ["step-00000004"]}
    assert main(asked(run, "prune", yes=True, **rules)) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": ["step-00000004"], "stale": []}
    assert (run.ckpt / "step-00000006.tmp-abc").is_dir()
    (run.ckpt / "step-00000006.tmp-abc").rmdir()
    assert names(run) == [1, 2, 3, 5]
    main(asked(run, "pin", "step-00000001", undo=True))
    main(asked(run, "pin", "step-00000003"))
    (run.ckpt / "latest").write_text("step-00000002\n")
    assert prune_checkpoints(run.ckpt, keep_last=1, keep_best=0) == [run.ckpt / "step-00000001"]
    assert names(run) == [2, 3, 5]


def test_keep_best_takes_the_least_finite_losses(run: RunFolder) -> None:
    assert prune_checkpoints(run.ckpt, keep_last=1, keep_best=2) == [run.ckpt / f"step-0000000{n}" for n in (4, 3)]
    (run.ckpt / "step-00000001" / "PINNED").unlink()
    assert prune_checkpoints(run.ckpt, keep_last=1, keep_best=2) == [run.ckpt / "step-00000001"]


def test_a_checkpoint_that_is_not_there_is_missing_input(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"step-00000009: no such checkpoint; there are: step-00000005"):
        main(asked(run, "verify", "step-00000009"))
    for path in run.ckpt.glob("step-*"):
        shutil.rmtree(path)
    (run.ckpt / "latest").unlink()
    for name, words in (("best", "no checkpoint has a validation loss"), ("latest", "no checkpoint; train")):
        with pytest.raises(MissingInputError, match=words):
            main(asked(run, "diff", name, other=asked(run, "diff", name)))


def test_diff_says_how_far_tensors_of_each_kind_are_apart(tmp_path: Path) -> None:
    one, two = sample(1), sample(1)
    two["model.weight"].tensor[3, 1] += 2.5
    two["optim.rest"].tensor[6, 2] = one["optim.rest"].tensor[6, 2] - 77
    wide = (two["model.weight"].tensor.double() - one["model.weight"].tensor.double()).abs().max()
    two["model.more"], one["model.less"] = whole(torch.zeros(2)), whole(torch.zeros(2))
    one["model.shape"], two["model.shape"] = whole(torch.zeros(2)), whole(torch.zeros(3))
    report = compare(save(tmp_path / "a", 1, one), save(tmp_path / "b", 2, two))
    assert (report["missing"], report["unexpected"]) == (["model.less"], ["model.more"])
    assert report["reshaped"] == ["model.shape"]
    assert report["state"] == {"position": [[1, 1], [1, 2]], "step": [1, 2]}
    assert report["identity"] == {}
    different = {kind: found for kind, found in report["kinds"].items() if found["different"]}
    assert different == {
        "model": {"tensors": 2, "different": 1, "max_abs": float(wide), "first": ["model.weight"]},
        "optim.rest": {"tensors": 1, "different": 1, "max_abs": 77.0, "first": ["optim.rest"]},
    }


def test_diff_does_not_mind_how_ranks_cut_a_tensor(tmp_path: Path) -> None:
    values = torch.randn(7, 3)
    path = save(tmp_path / "a", 1, {"w": whole(values)})
    parts = [
        {"w": Entry(tensor=values[start:end], rows=Rows(start=start, count=end - start, shape=(7, 3), primary=True))}
        for start, end in ((0, 2), (2, 7))
    ]
    report = compare(path, save_from_two(tmp_path / "b", 1, parts))
    assert report["kinds"] == {"w": {"tensors": 1, "different": 0, "max_abs": 0.0, "first": []}}


def test_the_command_needs_no_torch_and_ends_with_the_contracts_codes(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    root = Path(__file__).resolve().parents[2]
    path = {"PYTHONPATH": f"{tmp_path / 'blind'}:{root}"}
    target = str(run.path)
    listed = call("ckpt", "ls", f"{target}/best", **path)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.splitlines()[1].startswith("step-00000002    complete ")
    write_event(run, "2026-01-01T00:00:00Z", "resume", step=2)
    pruned = call("ckpt", "prune", target, "--keep-last", "1", "--yes", "--json", **path)
    assert json.loads(pruned.stdout) == {"deleted": ["step-00000004", "step-00000003"], "stale": []}
    assert names(run) == [1, 2, 5]
    flip(run.ckpt / "step-00000005", "optim.rest")
    assert call("ckpt", "verify", f"{target}/latest", **path).returncode == 0
    damaged = call("ckpt", "verify", "a/latest", "--hash", "--runs", str(run.path.parent), **path)
    assert (damaged.returncode, damaged.stderr.count("\n")) == (74, 1)
    assert "the bytes of tensor 'optim.rest' have changed" in damaged.stdout
    assert "no such checkpoint" in refused(66, "ckpt", "verify", f"{target}/step-00000077", **path)
    assert "prune takes a run" in refused(64, "ckpt", "prune", f"{target}/latest", **path)
