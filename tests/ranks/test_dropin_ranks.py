"""The drop-in model on two gloo ranks, with nothing of this package but the import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from moe_recipes import AutoModelForCausalLM, DistributedConfig
from tests.ranks.launch import run_on_ranks
from tests.unit.data_tools import chat, make_tokenizer
from tests.unit.test_dropin import tiny

IDS = torch.arange(96).mul(37).remainder(256).view(4, 24)
SCRIPT = """
import sys, torch
from moe_recipes import AutoModelForCausalLM, DistributedConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(fsdp_size=2, ep_size=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
ids = torch.arange(48).view(2, 24) + 48 * torch.distributed.get_rank()
for step in range(6):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    print(f"LOSS {step} {torch.distributed.get_rank()} {loss.item()}", flush=True)
model.save_pretrained(sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dropin-ranks") / "model"
    torch.manual_seed(0)
    config = tiny()
    config.vocab_size = 320
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_model(folder: Path) -> None:
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert isinstance(model, transformers.Qwen3MoeForCausalLM)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]
    assert layout.ep_implementation == "auto", "the caller's layout is left alone"
    assert model.model.layers[0].mlp.experts.down_proj.to_local().shape[0] == 2
    as_dict = AutoModelForCausalLM.from_pretrained(folder, distributed_config={"fsdp_size": 2, "ep_size": 2})
    assert as_dict.model.layers[0].mlp.experts.down_proj.to_local().shape[0] == 2
    mine = IDS.chunk(2)[dist.get_rank()]
    loss = model(mine, labels=mine).loss
    loss.backward()
    local = [reference(part, labels=part).loss for part in IDS.chunk(2)]
    torch.testing.assert_close(loss.detach(), local[dist.get_rank()].detach(), rtol=1e-5, atol=0)
    ((local[0] + local[1]) / 2).backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_local_mean_loss_and_gradients_that_are_rank_means(folder: Path) -> None:
    run_on_ranks(check_model, 2, folder)


def sft_losses(model: transformers.PreTrainedModel, out: Path) -> list[float]:
    import datasets
    import trl

    words = ["the cat sat", "on the mat", "and the dog sat", "on the cat"]
    arguments = trl.SFTConfig(
        output_dir=str(out / "trainer"), max_steps=8, per_device_train_batch_size=2, learning_rate=0.01,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_length=64,
    )  # fmt: skip
    data = datasets.Dataset.from_list([chat("say it", words[n % 4]) for n in range(64)])
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model(str(out / "saved"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(folder: Path, out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE="2")  # Accelerate asks for them
    losses = []
    for auto in (AutoModelForCausalLM, transformers.AutoModelForCausalLM):
        layout = DistributedConfig(fsdp_size=2, ep_size=2)
        model = auto.from_pretrained(folder, distributed_config=layout)
        losses.append(sft_losses(model, out / str(len(losses))))
        kept = {name: whole(tensor.detach()) for name, tensor in model.named_parameters()}
        dist.barrier()
        if dist.get_rank() == 0:
            saved = transformers.AutoModelForCausalLM.from_pretrained(out / str(len(losses) - 1) / "saved")
            for name, tensor in saved.named_parameters():
                assert torch.equal(tensor, kept[name]), name
    ours, plain = losses
    assert len(ours) == 8
    assert ours[-1] < ours[0] - 1
    assert ours == pytest.approx(plain, rel=1e-3)


def test_sft_trainer_with_expert_parallelism(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    run_on_ranks(sft, 2, folder, tmp_path)


def test_a_script_under_torchrun_with_one_import(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), str(folder), f"{tmp_path}/out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall(r"LOSS (\d) (\d) ([\d.]+)", done.stdout)  # lines of two ranks may run together
    losses = {(int(step), int(rank)): float(loss) for step, rank, loss in said}
    assert len(losses) == 12
    for rank in (0, 1):
        assert losses[5, rank] < losses[0, rank] - 0.5
    index = tmp_path / "out" / "model.safetensors.index.json"
    files = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    keys: set[str] = set()
    for name in files:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            keys |= set(file.keys())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert keys == set(file.keys())
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
