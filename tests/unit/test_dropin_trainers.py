"""The drop-in model under PEFT, Transformers' Trainer and TRL, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Qwen3MoeForCausalLM, Trainer, TrainingArguments

from moe_recipes import AutoModelForCausalLM
from tests.unit.data_tools import chat, make_tokenizer
from tests.unit.test_dropin import IDS, plain, tiny

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products lose more to waiting for busy cores than they win by using several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainers") / "model"
    torch.manual_seed(0)
    config = tiny()
    config.vocab_size = 320
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def lora(kind: str) -> peft.LoraConfig:
    if kind == "attention":
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=names, init_lora_weights=False)


@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_peft_trains_saves_merges_and_reloads(folder: Path, tmp_path: Path, kind: str) -> None:
    models = []
    for base in (AutoModelForCausalLM.from_pretrained(folder), plain(folder)):
        torch.manual_seed(1)
        models.append(peft.get_peft_model(base, lora(kind)))
    ours, reference = models
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    mine, theirs = ours(IDS, labels=IDS).loss, reference(IDS, labels=IDS).loss
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    mine.backward()
    theirs.backward()
    others = dict(reference.named_parameters())
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad.any(), name
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    optimizer.step()
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(folder), tmp_path)
    merged = ours.merge_and_unload()
    with torch.no_grad():
        logits = again(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, plain(folder)(IDS).logits, atol=1e-3)


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 200, (64,), generator=generator).tolist()
    return [
        {"input_ids": [start + i % 7 for i in range(24)], "labels": [start + i % 7 for i in range(24)]}
        for start in starts
    ]


def arguments(out: Path, **options) -> dict:
    return {
        "output_dir": str(out), "max_steps": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 0.01, "logging_steps": 1, "save_steps": 6, "report_to": [], "use_cpu": True, "seed": 0,
        "disable_tqdm": True, **options,
    }  # fmt: skip


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_learns_saves_and_resumes(folder: Path, tmp_path: Path, checkpointing: bool) -> None:
    def make(out: Path, model: Qwen3MoeForCausalLM) -> Trainer:
        options = TrainingArguments(**arguments(out, gradient_checkpointing=checkpointing))
        return Trainer(model=model, args=options, train_dataset=rows())

    unbroken = make(tmp_path / "a", AutoModelForCausalLM.from_pretrained(folder))
    unbroken.train()
    assert losses(unbroken)[-1] < losses(unbroken)[0] - 1
    reference = make(tmp_path / "plain", plain(folder))
    reference.train()
    assert losses(unbroken) == pytest.approx(losses(reference), rel=1e-3)
    resumed = make(tmp_path / "a", AutoModelForCausalLM.from_pretrained(folder))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert losses(resumed) == losses(unbroken)
    for (name, one), other in zip(resumed.model.named_parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-12")
    for (name, one), other in zip(saved.named_parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_learns(folder: Path, tmp_path: Path, packing: bool) -> None:
    words = ["the cat sat", "on the mat", "and the dog sat", "on the cat"]
    data = datasets.Dataset.from_list([chat("say it", words[n % 4]) for n in range(64)])
    found = {}
    for name, model in (("ours", AutoModelForCausalLM.from_pretrained(folder)), ("plain", plain(folder))):
        out = arguments(tmp_path / name, max_length=64, packing=packing, save_strategy="no", bf16=False, fp16=False)
        trainer = trl.SFTTrainer(
            model=model, args=trl.SFTConfig(**out), train_dataset=data, processing_class=make_tokenizer()
        )
        trainer.train()
        found[name] = losses(trainer)
    assert found["ours"][-1] < found["ours"][0] - 1
    assert found["ours"] == pytest.approx(found["plain"], rel=1e-3)
