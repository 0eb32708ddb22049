"""Multi-token prediction through ``AutoModelForCausalLM.from_pretrained``: loaded, out of the way, and saved again."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_recipes import AutoModelForCausalLM
from tests.tiny_models import mtp_tensors, save_tiny_model

FAMILIES = ("deepseek_v3_mtp", "nemotron_h_mtp")
IDS = torch.arange(48).mul(37).remainder(256).view(2, 24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("mtp_kept")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            save_tiny_model(family, root / family)
        return root / family

    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_saved_again_bit_for_bit(folders, tmp_path: Path, family: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folders(family), output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path)
    saved, source = tensors(tmp_path), tensors(folders(family))
    assert saved.keys() == source.keys()
    assert [key for key in source if not torch.equal(saved[key], source[key])] == []
    assert (tmp_path / "config.json").read_text() == (folders(family) / "config.json").read_text()
    # A second time, with a model that was copied, and after a change of what the blocks share with the model.
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad():
        again.get_input_embeddings().weight.add_(1)
    again.save_pretrained(tmp_path / "again", state_dict=again.state_dict())
    saved = tensors(tmp_path / "again")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in mtp_tensors(family).items())
    if family == "deepseek_v3_mtp":
        shared = "model.layers.3.embed_tokens.weight", "model.embed_tokens.weight"
        assert torch.equal(*(saved[name] for name in shared))
        assert not torch.equal(saved[shared[0]], source[shared[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_that_of_transformers_otherwise(folders, family: str) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = AutoModelForCausalLM.from_pretrained(folders(family))
    theirs = AutoModelForCausalLM.from_pretrained(folders(family), mtp=False)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders(family))
    assert isinstance(ours, type(plain))
    assert type(ours).__name__ == type(plain).__name__
    assert type(theirs) is type(plain)
    frozen = [name for name, parameter in ours.named_parameters() if not parameter.requires_grad]
    names = {name for name, _ in plain.named_parameters()}
    assert set(frozen) == {name for name, _ in ours.named_parameters()} - names != set()
    assert {name for name, _ in theirs.named_parameters()} == names
    for model in (ours, theirs):
        out = model(IDS, labels=IDS)
        assert torch.equal(model.generate(IDS, **options), ours.generate(IDS, **options))
        out.loss.backward()
    got, wanted = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in theirs.named_parameters() if parameter.grad is not None}


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    found = [r.getMessage() for r in caplog.records if "multi-token prediction" in r.getMessage() and r.levelno > 20]
    assert len(found) == 1
    assert "\n" not in found[0]
    return found[0]


def test_leaving_them_out_is_said(folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    AutoModelForCausalLM.from_pretrained(folders("nemotron_h_mtp"), mtp=False)
    assert "left out (mtp=False); what save_pretrained writes lacks them" in one_warning(caplog)

    source = tensors(folders("nemotron_h_mtp"))
    half = {key: tensor for key, tensor in source.items() if not key.startswith("mtp.layers.1.")}
    save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders("nemotron_h_mtp") / "config.json").read_bytes())
    caplog.clear()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "not whole blocks of 2" in one_warning(caplog)
    assert not any("mtp" in name for name, _ in model.named_parameters())


def test_a_checkpoint_without_them_says_nothing(folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_model("nemotron_h", tmp_path)
    caplog.set_level(logging.INFO)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, mtp=False)
    assert "multi-token" not in caplog.text


def test_a_trainer_trains_all_but_them(folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders("deepseek_v3_mtp"))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved, source = tensors(tmp_path / "saved"), tensors(folders("deepseek_v3_mtp"))
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in mtp_tensors("deepseek_v3_mtp").items())
    assert not torch.equal(saved["lm_head.weight"], source["lm_head.weight"])
    assert torch.equal(saved["model.layers.3.shared_head.head.weight"], saved["lm_head.weight"])
