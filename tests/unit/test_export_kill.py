"""Exports that are killed, or meet a full disk, at every call that changes the disk."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.models.exporting.export import export_model
from moe_recipes.models.exporting.folder import old_folder
from moe_recipes.models.exporting.verify import verify_export
from tests.tiny_models import tiny_config

SYSTEM_CALLS = ("mkdir", "open", "ftruncate", "pwrite", "write", "fsync", "rename", "rmdir", "unlink")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    """Two sets of weights of one model, as small as it gets."""
    config = tiny_config("qwen3_moe")
    config.update({"num_hidden_layers": 1, "num_experts": 2, "hidden_size": 8, "moe_intermediate_size": 4})
    config.update({"head_dim": 4, "vocab_size": 16})
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(AutoModelForCausalLM.from_config(config))
    return made


def export(model: PreTrainedModel, out: Path) -> None:
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    export_model(
        model, out, source_dir=None, config_json=b"{}", tokenizer_dir=tokenizer, rank=0, num_ranks=1,
        barrier=lambda: None, agree=lambda ok: ok, max_file_bytes=600,
    )  # fmt: skip


def die_at(at: int, instead: Callable[..., object]) -> list[int]:
    """Let the ``at``-th call that changes the disk do something else; returns their count. For a child process."""
    calls = [0]

    def wrap(real):
        def call(*args, **keywords):
            calls[0] += 1
            return instead(real, *args) if calls[0] == at else real(*args, **keywords)

        return call

    for name in SYSTEM_CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return calls


def half_and_die(real, *args):
    if real.__name__ in ("pwrite", "write"):
        real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
    os._exit(9)


def disk_full(real, *args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(action) -> int:
    """Run ``action`` in a fork; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def good(folder: Path, model: PreTrainedModel) -> bool:
    return folder.exists() and verify_export(folder, model, rank=0, num_ranks=1) == []


@pytest.mark.slow
def test_kill_point_any_call_leaves_an_export_and_the_next_one_is_whole(
    models: list[PreTrainedModel], tmp_path: Path
) -> None:
    earlier, later = models
    for at in range(1, 400):
        out = tmp_path / str(at) / "export"
        out.parent.mkdir()
        export(earlier, out)

        def killed(out=out, at=at):
            die_at(at, half_and_die)
            export(later, out)

        status = in_child(killed)
        assert status in (0, 9)
        # Between the two renames the earlier one has another name, which the next export gives back.
        assert good(out, earlier) or good(out, later) or (not out.exists() and good(old_folder(out), earlier)), at
        export(later, out)
        assert good(out, later), at
        assert sorted(path.name for path in out.parent.iterdir()) == ["export", "tokenizer"]
        if status == 0:
            assert at > 100, "the export makes fewer calls than it has tensors"
            return
    raise AssertionError("the export never ended")


@pytest.mark.slow
def test_kill_point_disk_full_at_any_call_keeps_the_earlier_export(
    models: list[PreTrainedModel], tmp_path: Path
) -> None:
    earlier, later = models
    for at in range(1, 400):
        out = tmp_path / str(at) / "export"
        out.parent.mkdir()
        export(earlier, out)

        def full(out=out, at=at):
            calls = die_at(at, disk_full)
            try:
                export(later, out)
            except CannotWriteError as error:
                os._exit(7 if "No space left on device" in str(error) else 1)
            os._exit(8 if calls[0] >= at else 0)

        status = in_child(full)
        assert status in (7, 8, 0), at
        # 8: it failed where only old things are cleared away.
        assert good(out, later) or (status == 7 and good(out, earlier)), at
        assert not (out.parent / "export.tmp").exists(), at
        if status == 0:
            assert at > 100
            return
    raise AssertionError("the export never ended")
