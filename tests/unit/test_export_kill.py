"""Exports that are killed, or meet a full disk, at every call that changes the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_recipes.config.errors import CannotWriteError
from moe_recipes.models.exporting.export import export_model
from moe_recipes.models.exporting.folder import old_folder
from moe_recipes.models.exporting.verify import verify_export
from tests.tiny_models import tiny_config
from tests.unit.dying import Countdown, die, disk_full, in_child


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
            Countdown(at, die)
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
            countdown = Countdown(at, disk_full)
            try:
                export(later, out)
            except CannotWriteError as error:
                os._exit(7 if "No space left on device" in str(error) else 1)
            os._exit(8 if countdown.calls >= at else 0)

        status = in_child(full)
        assert status in (7, 8, 0), at
        # 8: it failed where only old things are cleared away.
        assert good(out, later) or (status == 7 and good(out, earlier)), at
        assert not (out.parent / "export.tmp").exists(), at
        if status == 0:
            assert at > 100
            return
    raise AssertionError("the export never ended")
