"""Checkpoints that somebody else may have put there are refused with the reason, and nothing of them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest

from moe_recipes.checkpoint.diff import compare
from moe_recipes.checkpoint.folder import list_checkpoints
from moe_recipes.checkpoint.manifest import complete_marker
from moe_recipes.checkpoint.store import latest_checkpoint, verify_checkpoint
from moe_recipes.config.errors import CorruptCheckpointError
from tests.unit.checkpoint_samples import load, sample, save, shard

STRANGER = 12345


def rewrite_manifest(path: Path, change) -> None:
    """Change the manifest and vouch for it again, as a forger would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    vouch(path, json.dumps(manifest).encode())


def vouch(path: Path, raw: bytes) -> None:
    (path / "manifest.json").write_bytes(raw)
    (path / "COMPLETE").write_bytes(complete_marker(raw))


def set_shape(*shape):
    return lambda m: m["tensors"]["model.weight"].update(shape=list(shape))


def own_shape(m) -> None:
    m["rank_tensors"][0]["cpu_rng"].update(shape=[2**61])


def outside(path: Path) -> None:
    """The bytes are right, but they lie elsewhere."""
    shutil.move(shard(path), path.parent.parent / "elsewhere")
    shard(path).symlink_to(path.parent.parent / "elsewhere")


def loop(path: Path) -> None:
    shard(path).unlink()
    shard(path).symlink_to(shard(path).name)


def linked_folder(path: Path) -> None:
    os.rename(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def looping_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    shard(path).unlink()
    os.mkfifo(shard(path))


def grow(name: str, num_bytes: int):
    return lambda path: os.truncate(path / name, num_bytes)


def forged_header(path: Path) -> None:
    """A shard of absurd shape whose manifest agrees with its size and its header's CRC."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}).encode()
    header = len(text).to_bytes(8, "little") + text
    shard(path).write_bytes(header + bytes(16))
    file = {"num_bytes": len(header) + 16, "crc32": zlib.crc32(header)}
    rewrite_manifest(path, lambda m: m["shards"][0].update(**file))


FORGED = {
    "link to another file": (outside, "symbolic link"),
    "link to itself": (loop, "symbolic link"),
    "linked folder": (linked_folder, "symbolic link"),
    "looping folder": (looping_folder, "symbolic link"),
    "pipe": (pipe, "not a regular file"),
    "shape of 2^62 rows": (lambda p: rewrite_manifest(p, set_shape(2**62, 3)), "'model.weight' of shape"),
    "negative shape": (lambda p: rewrite_manifest(p, set_shape(-7, -3)), "has the shape [-7, -3]"),
    "shape of true": (lambda p: rewrite_manifest(p, set_shape(7, True)), "has the shape [7, True]"),
    "own tensor of 2^61": (lambda p: rewrite_manifest(p, own_shape), "'cpu_rng' of shape"),
    "deep JSON": (lambda p: vouch(p, b"[" * 10**6), "RecursionError"),
    "manifest of 5 GB": (grow("manifest.json", 5 * 10**9), "more than any such file"),
    "marker of 5 GB": (grow("COMPLETE", 5 * 10**9), "more than any such file"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_checkpoint_is_refused_with_the_reason(tmp_path: Path, forgery: str) -> None:
    act, words = FORGED[forgery]
    older, path = save(tmp_path / "ckpt", 1), save(tmp_path / "ckpt", 2)
    act(path)
    (problem,) = verify_checkpoint(path)
    assert words in problem
    assert str(path) in problem
    before = sample(3)
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path, before)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(before[name].tensor.equal(entry.tensor) for name, entry in sample(3).items())
    with pytest.raises(CorruptCheckpointError):
        compare(older, path)
    assert latest_checkpoint(tmp_path / "ckpt") == older
    assert [item.is_complete for item in list_checkpoints(tmp_path / "ckpt")] == [False, True]


def test_an_absurd_header_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    forged_header(path)
    (problem,) = verify_checkpoint(path, hashes=True)
    assert "does not lie where its shape" in problem
    with pytest.raises(CorruptCheckpointError, match="does not lie where its shape"):
        load(path, sample(1))


class Runs:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "COMPLETE", "rank-00000.json"])
def test_a_pickle_is_never_run(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "ckpt", 1)
    raw = pickle.dumps(Runs(tmp_path / "ran"))
    (path / name).write_bytes(raw)
    if name == "manifest.json":
        vouch(path, raw)
    assert verify_checkpoint(path, hashes=True)
    if name != "rank-00000.json":  # which no load reads
        with pytest.raises(CorruptCheckpointError):
            load(path, sample(1))
    assert not (tmp_path / "ran").exists()
    pickle.loads(raw)
    assert (tmp_path / "ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["", "rank-00000.safetensors", "manifest.json", "COMPLETE"])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, what: str) -> None:
    path = save(tmp_path, 1)
    os.chown(path / what, STRANGER, -1)
    (problem,) = verify_checkpoint(path)
    assert f"it belongs to user {STRANGER}, not to user 0" in problem
    with pytest.raises(CorruptCheckpointError, match="belongs to user"):
        load(path, sample(1))
    # Root of a container over a user's own files: the folder of all checkpoints is that user's too.
    for item in (tmp_path, path, *path.iterdir()):
        os.chown(item, STRANGER, -1)
    assert verify_checkpoint(path, hashes=True) == []
