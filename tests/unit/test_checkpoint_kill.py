"""Saves that are killed, or meet a full disk, at every call that changes the disk."""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_recipes.checkpoint.staging import Staging
from moe_recipes.checkpoint.store import latest_checkpoint, prune_checkpoints, step_of, verify_checkpoint
from moe_recipes.config.errors import CannotWriteError
from tests.unit.checkpoint_samples import assert_holds, sample, save, whole
from tests.unit.dying import Countdown, die, disk_full, in_child


def test_a_file_that_may_not_grow_is_cannot_write(tmp_path):
    save(tmp_path, 1)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(CannotWriteError) as caught:
            save(tmp_path, 2, {"big": whole(torch.zeros(5000))})
        assert "rank 0 cannot write" in str(caught.value)
        assert "rank-00000.safetensors: File too large" in str(caught.value)

    assert in_child(limited) == 0
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert_holds(latest_checkpoint(tmp_path), 1)


def test_a_folder_that_cannot_be_made_is_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="Not a directory"):
        save(tmp_path / "file" / "ckpt", 1)


def save_beside(folder, step):
    """From copies in host memory, in a thread, as an asynchronous save does."""
    entries = sample(step)
    copied = Staging(entries).copy(entries)
    for entry in entries.values():
        entry.tensor.zero_()
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(save, folder, step, copied).result()


@pytest.mark.parametrize(("step", "saves"), [(2, save), (3, save), (3, save_beside)])
def test_kill_point_at_any_call_a_whole_checkpoint_remains(tmp_path, step, saves):
    """Step 3 is new; step 2 replaces a folder that is there. Pruning follows, as in the trainer."""
    for at in range(1, 200):
        folder = tmp_path / str(at)
        save(folder, 1)
        save(folder, 2)

        def save_and_prune(folder=folder, at=at):
            Countdown(at, die)
            saves(folder, step)
            prune_checkpoints(folder, keep_last=1, protect=[])

        status = in_child(save_and_prune)
        assert status in (0, 9)
        found = latest_checkpoint(folder)
        assert found.name.split(".")[0] in ("step-00000002", f"step-0000000{step}")
        assert_holds(found, int(found.name[5:13]))
        pointed = folder / (folder / "latest").read_text().strip()
        # Replacing a step, its old folder has another name for a moment, which a resume knows.
        assert_holds(pointed if pointed.exists() else next(folder.glob(f"{pointed.name}.replaced-*")), step_of(pointed))
        assert_holds(save(folder, 4), 4)
        left = sorted(os.listdir(folder))
        assert left[0] == "latest"
        assert all(name.startswith("step-") and not verify_checkpoint(folder / name) for name in left[1:]), left
        if status == 0:
            assert at > 30
            return
    raise AssertionError("the save never ended")


def test_disk_full_at_any_call_leaves_the_old_checkpoint(tmp_path):
    for at in range(1, 200):
        folder = tmp_path / str(at)
        save(folder, 1)

        def save_on_full_disk(folder=folder, at=at):
            Countdown(at, disk_full)
            with pytest.raises(CannotWriteError, match=rf"rank 0 cannot write {folder}.*: No space left on device"):
                save(folder, 2)
            os._exit(7)

        status = in_child(save_on_full_disk)
        assert status in (1, 7)
        found = latest_checkpoint(folder)
        assert_holds(found, int(found.name[5:13]))
        assert not [name for name in os.listdir(folder) if ".tmp-" in name or "replaced" in name]
        if status == 1:  # nothing failed: every call has had its turn
            assert at > 15
            return
    raise AssertionError("the save never ended")
