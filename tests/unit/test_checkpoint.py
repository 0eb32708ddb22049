"""Saving and loading in one process: values, refusals, damage."""

from __future__ import annotations

import json
import logging
import os

import pytest
import safetensors.torch
import torch

from moe_recipes.checkpoint.store import (
    Entry,
    latest_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
)
from moe_recipes.config.errors import (
    CorruptCheckpointError,
    EnvironmentMismatchError,
    RecipeError,
)
from moe_recipes.runtime.sharding import Rows
from tests.unit.checkpoint_samples import IDENTITY, assert_holds, load, sample, save, shard, whole


def test_everything_comes_back(tmp_path):
    path = save(tmp_path / "run" / "ckpt", 200)
    assert path.name == "step-00000200"
    assert (path.parent / "latest").read_text() == "step-00000200\n"
    assert sorted(os.listdir(path)) == ["COMPLETE", "manifest.json", "rank-00000.json", "rank-00000.safetensors"]
    assert_holds(path, 200)
    by_safetensors = safetensors.torch.load_file(shard(path))
    assert torch.equal(by_safetensors["model.weight"], sample(200)["model.weight"].tensor)
    assert latest_checkpoint(path.parent) == path


def test_loads_into_transposed_and_partial_rows(tmp_path):
    entries, wanted = sample(9), sample(3)
    del entries["optim.exp_avg"], wanted["optim.exp_avg"]
    path = save(tmp_path, 4, wanted)
    part = torch.zeros(3, 2, dtype=torch.bfloat16).t()
    entries["model.weight"] = Entry(tensor=part, rows=Rows(start=4, count=2, shape=(7, 3), primary=True))
    entries["optim.moment"] = Entry(
        tensor=torch.zeros(0, dtype=torch.int8), rows=Rows(start=5, count=0, shape=(5,), primary=True)
    )
    load(path, entries)
    assert torch.equal(part, wanted["model.weight"].tensor[4:6])


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("model.weight", whole(torch.zeros(7, 3)), ["model.weight", "BF16 [7, 3]", "F32 [7, 3]"]),
        ("model.weight", whole(torch.zeros(8, 3).bfloat16()), ["model.weight", "[7, 3]", "[8, 3]"]),
        ("optim.exp_avg", whole(torch.zeros(7, 3, dtype=torch.uint8)), ["optim.exp_avg", "quantised"]),
        (
            "optim.exp_avg",
            Entry(
                tensor=torch.zeros(6, dtype=torch.uint8),
                rows=Rows(start=0, count=4, shape=(7, 3), primary=True),
                opaque=True,
            ),
            ["optim.exp_avg", "rows 0..4", "fsdp_size"],
        ),
        (
            "optim.exp_avg",
            Entry(
                tensor=torch.zeros(12, dtype=torch.uint8),
                rows=Rows(start=0, count=7, shape=(7, 3), primary=True),
                opaque=True,
            ),
            ["optim.exp_avg", "[11]", "[12]"],
        ),
        ("extra", whole(torch.zeros(1)), ["1 missing (extra)", "0 unexpected"]),
        ("empty", None, ["0 missing", "1 unexpected (empty)"]),
    ],
)
def test_another_model_is_refused_before_anything_changes(tmp_path, name, entry, words):
    path = save(tmp_path, 1)
    entries = sample(2)
    entries[name] = entry
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    with pytest.raises(RecipeError) as caught:
        load(path, entries)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert torch.equal(entries["optim.rest"].tensor, sample(2)["optim.rest"].tensor)


def test_another_identity_is_refused_with_both_values(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(RecipeError, match=r"model was 'a1b2', is 'ffff'; seed was '\(not set\)', is 1"):
        load(path, sample(1), identity={**IDENTITY, "model": "ffff", "seed": 1})


def test_rank_tensors_stay_untouched_at_another_rank_count(tmp_path):
    path, rng = save(tmp_path, 1), torch.zeros(16, dtype=torch.uint8)
    state = load(path, sample(2), rank_tensors={"cpu_rng": rng}, rank=1, num_ranks=2)
    assert state["rank_tensors_loaded"] is False
    assert rng.sum() == 0


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_byte_is_found_and_its_tensor_named(tmp_path):
    path = save(tmp_path, 1)
    with open(shard(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    flip(shard(path), 8 + length + header["optim.rest"]["data_offsets"][0] + 5)
    assert verify_checkpoint(path) == []
    (problem,) = verify_checkpoint(path, hashes=True)
    assert "rank-00000.safetensors" in problem
    assert "'optim.rest'" in problem
    with pytest.raises(CorruptCheckpointError, match=r"rank-00000\.safetensors: .*'optim\.rest'"):
        load(path, sample(2))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: os.truncate(shard(path), shard(path).stat().st_size - 1), "rank-00000.safetensors"),
        (lambda path: shard(path).unlink(), "rank-00000.safetensors: No such file"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda path: (path / "COMPLETE").unlink(), "COMPLETE: No such file"),
        (lambda path: os.truncate(path / "manifest.json", 50), "manifest.json"),
        (lambda path: flip(path / "manifest.json", 60), "manifest.json"),
        (lambda path: os.truncate(path / "COMPLETE", 0), "COMPLETE"),
        (lambda path: (path / "COMPLETE").write_bytes(b"\xff[]"), "COMPLETE"),
    ],
)
def test_damage_is_named_and_the_older_checkpoint_is_used(tmp_path, caplog, damage, word):
    older, path = save(tmp_path, 1), save(tmp_path, 2)
    damage(path)
    assert word in verify_checkpoint(path)[0]
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path, sample(3))
    assert word in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == older
    assert "step-00000002 is damaged" in caplog.text
    assert_holds(older, 1)
    damage(older)
    with pytest.raises(CorruptCheckpointError, match="no checkpoint is whole"):
        latest_checkpoint(tmp_path)


def test_a_flipped_header_byte_is_found(tmp_path):
    path = save(tmp_path, 1)
    raw = shard(path).read_bytes()
    shard(path).write_bytes(raw.replace(b"optim.moment", b"optim.momenT"))
    assert "header" in verify_checkpoint(path, hashes=True)[0]
    with pytest.raises(CorruptCheckpointError, match="header"):
        load(path, sample(2))


def rewrite_manifest(path, change):
    """Change the manifest and vouch for it again, as a forger or a newer version would."""
    from moe_recipes.checkpoint.manifest import complete_marker

    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    raw = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(raw)
    (path / "COMPLETE").write_bytes(complete_marker(raw))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m["shards"][0].update(name="../../x.safetensors"), CorruptCheckpointError),
        (lambda m: m["records"][0].update(name="/etc/passwd"), CorruptCheckpointError),
        (lambda m: m["shards"].append(m["shards"][0]), CorruptCheckpointError),
        (lambda m: m["tensors"]["model.weight"]["pieces"][0].__setitem__(0, 7), CorruptCheckpointError),
        (lambda m: m["tensors"]["model.weight"]["pieces"][0].__setitem__(2, 6), CorruptCheckpointError),
        (lambda m: m["tensors"]["model.weight"].pop("dtype"), CorruptCheckpointError),
        (lambda m: m.update(format_version=99), EnvironmentMismatchError),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, change, error):
    path = save(tmp_path, 1)
    rewrite_manifest(path, change)
    assert len(verify_checkpoint(path)) == 1
    with pytest.raises(error, match=r"step-00000001"):
        load(path, sample(1))


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "step-00000001.tmp-abc").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_pointer_to_nowhere_falls_back(tmp_path, caplog):
    path = save(tmp_path, 1)
    for text in ("step-00000099\n", "../elsewhere\n", ""):
        (tmp_path / "latest").write_text(text)
        assert latest_checkpoint(tmp_path) == path
    assert "step-00000099" in caplog.text
    assert "names no checkpoint" in caplog.text


def test_prune_keeps_newest_latest_protected_and_damaged(tmp_path):
    paths = [save(tmp_path, step) for step in range(1, 8)]
    shard(paths[5]).unlink()
    (tmp_path / "latest").write_text("step-00000003\n")
    deleted = prune_checkpoints(tmp_path, keep_last=2, protect=[tmp_path / "x" / ".." / paths[0].name])
    assert deleted == [paths[3], paths[1]]
    assert sorted(os.listdir(tmp_path)) == ["latest", *(f"step-0000000{n}" for n in (1, 3, 5, 6, 7))]
    with pytest.raises(ValueError, match="keep_last=0"):
        prune_checkpoints(tmp_path, keep_last=0, protect=[])
    assert prune_checkpoints(tmp_path / "nowhere", keep_last=1, protect=[]) == []


def test_a_step_saved_twice_is_the_second(tmp_path):
    save(tmp_path, 1)
    torch.manual_seed(0)
    path = save(tmp_path, 1, sample(42))
    entries = sample(1)
    load(path, entries)
    assert torch.equal(entries["optim.rest"].tensor, sample(42)["optim.rest"].tensor)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(tensor=torch.zeros(2, 2), rows=Rows(start=0, count=3, shape=(3, 2), primary=True)), "local shape"),
        (Entry(tensor=torch.zeros(2, 2), rows=Rows(start=2, count=2, shape=(3, 2), primary=True)), "outside"),
        (Entry(tensor=torch.zeros(2, 2), rows=Rows(start=1, count=2, shape=(3, 2), primary=True)), "rows 0..1"),
        (Entry(tensor=torch.zeros(2, 2), rows=Rows(start=0, count=2, shape=(3, 2), primary=True)), "by no rank"),
        (Entry(tensor=torch.zeros(3, dtype=torch.complex128), rows=whole(torch.zeros(3)).rows), "complex128"),
    ],
)
def test_lost_rows_are_an_error_of_the_save(tmp_path, entry, message):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        save(tmp_path, 2, {**sample(2), "bad": entry})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]


def test_what_is_not_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="state of a checkpoint must be JSON"):
        save(tmp_path, 1, state={"rng": torch.zeros(1)})
