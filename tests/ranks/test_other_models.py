"""A dense model, and a mixture of experts that Transformers cannot spread over ranks, go through the same trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DbrxConfig, JetMoeConfig, LlamaConfig, PreTrainedConfig

from moe_recipes.config.run_folder import RunFolder
from tests.ranks.runs import (
    VOCAB_SIZE,
    exported_files,
    records,
    signal_rank,
    steps,
    train,
    trained,
    when_step,
    write_task,
)

COMMON = {
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
NO_EXPERTS = "the model has no experts behind Transformers' experts interface"
SLOW = pytest.mark.slow


def config_of(family: str) -> PreTrainedConfig:
    if family == "dbrx":  # experts of its own, no expert-parallel plan
        experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
        return DbrxConfig(
            vocab_size=VOCAB_SIZE, max_seq_len=256, d_model=32, n_heads=4, n_layers=2,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={**experts, "ffn_act_fn": {"name": "silu"}},
        )  # fmt: skip
    if family == "jetmoe":
        return JetMoeConfig(**COMMON, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    return LlamaConfig(**{**COMMON, "tie_word_embeddings": family == "llama_tied"}, num_attention_heads=4)


def task_of(family: str, folder: Path) -> Path:
    return write_task(folder / family, config_of(family), data={"seq_len": 128}, train={"steps": 8})


def applied(run_dir: Path) -> dict[str, tuple[bool, str]]:
    found = json.loads(RunFolder(run_dir).manifest.read_bytes())["optimizations"]
    return {item["name"]: (item["applied"], item["reason"]) for item in found}


def mean_loss_of_single_documents(folder: Path, chats: list) -> float:
    """Plain Transformers, one chat at a time: summed loss of the assistant's tokens over their number."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    loss, count = 0.0, 0
    for chat in chats:
        encoded = tokenizer.apply_chat_template(
            chat["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, learned = encoded["input_ids"], encoded["assistant_masks"][0, 1:].bool()
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        loss += float(F.cross_entropy(logits[learned], ids[0, 1:][learned], reduction="sum"))
        count += int(learned.sum())
    return loss / count


@pytest.mark.parametrize("family", ["llama_tied", pytest.param("dbrx", marks=SLOW), pytest.param("llama", marks=SLOW)])
def test_trains_stops_resumes_and_exports(tmp_path: Path, family: str) -> None:
    recipe = task_of(family, tmp_path)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = train(recipe, unbroken)
    assert done.returncode == 0, done.stdout
    losses = [record["loss"] for record in records(unbroken)]
    assert losses[-1] < losses[0] - 1

    found = applied(unbroken)
    assert found["fused experts"] == found["expert dispatch"] == (False, NO_EXPERTS)
    for name in ("activation checkpointing", "fused linear cross-entropy", "packing", "FSDP2"):
        assert found[name][0], name
        assert f"{name}: applied" in done.stdout

    stopped = train(recipe, broken, meanwhile=when_step(broken, 2, signal_rank(1, signal.SIGTERM)))
    assert stopped.returncode == 75, stopped.stdout
    assert 2 <= len(steps(broken)) < 8
    resumed = train(recipe, broken)
    assert resumed.returncode == 0, resumed.stdout
    assert trained(broken) == trained(unbroken)
    assert exported_files(broken) == exported_files(unbroken)

    exported, info = AutoModelForCausalLM.from_pretrained(unbroken / "export", output_loading_info=True)
    assert not any(info.values())
    probe = load_file(unbroken / "export_probe.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(exported(probe["input_ids"]).logits, probe["logits"], rtol=0, atol=1e-5)
    words = [sys.executable, "-m", "moe_recipes.models.check_export", str(unbroken)]
    checked = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "loads in plain Transformers" in checked.stdout
    source = load_file(tmp_path / family / "model" / "model.safetensors")
    published = {
        key: tensor for path in (unbroken / "export").glob("*.safetensors") for key, tensor in load_file(path).items()
    }
    assert published.keys() == source.keys()
    assert not any(torch.equal(published[key], source[key]) for key in source if source[key].ndim > 1)


@pytest.mark.parametrize("family", ["llama_tied", pytest.param("dbrx", marks=SLOW), pytest.param("jetmoe", marks=SLOW)])
def test_the_first_loss_is_that_of_plain_transformers_one_document_at_a_time(tmp_path: Path, family: str) -> None:
    recipe = task_of(family, tmp_path)
    chats = [json.loads(line) for line in (tmp_path / family / "chats.jsonl").read_text().splitlines()][:6]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    once = [
        "train.steps=1",
        "train.grad_accum_steps=1",
        "train.activation_checkpointing=none",
        "checkpoint.export=false",
    ]
    done = train(recipe, tmp_path / "run", *once, f"data.train=[{few}]", "data.seq_len=200")
    assert done.returncode == 0, done.stdout
    data = json.loads(RunFolder(tmp_path / "run").manifest.read_bytes())["data"]["train"]
    assert (data["rows"], data["packed_rows"]) == (6, 2), "each rank must get one row of several documents"
    (record,) = records(tmp_path / "run")
    assert record["num_label_tokens"] == data["label_tokens"]
    expected = mean_loss_of_single_documents(tmp_path / family, chats)
    assert record["loss"] == pytest.approx(expected, rel=2e-6)


@SLOW
def test_recompute_is_refused_where_the_family_has_none(tmp_path: Path) -> None:
    done = train(task_of("jetmoe", tmp_path), tmp_path / "run")
    assert done.returncode == 64
    assert "set train.activation_checkpointing=none" in done.stdout
    assert "Traceback" not in done.stdout


@SLOW
def test_expert_parallelism_is_refused_where_the_family_has_no_plan(tmp_path: Path) -> None:
    done = train(task_of("jetmoe", tmp_path), tmp_path / "run", "parallel.ep_size=2")
    assert done.returncode == 64
    assert "'jetmoe' has no expert-parallel plan" in done.stdout
    assert "Traceback" not in done.stdout
