"""Real runs of tiny models for the tests: a folder with model, tokenizer, chats and recipe, and the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe_recipes.config.run_folder import RunFolder
from moe_recipes.data.stdlib_chats import train_tokenizer

TIMEOUT_S = 200
WORDS = "the cat dog bird sat ran flew on in over mat house tree and then it saw a red blue green ball".split()
VOCAB_SIZE = 320


def write_task(folder: Path, config: PreTrainedConfig, **sections: Mapping[str, Any]) -> Path:
    """A model with random weights, a tokenizer, 120 chats and a recipe for two ranks. Returns the recipe.

    ``sections`` replace keys of the recipe: ``train={"steps": 12}``.
    """
    texts = random.Random(0)
    answers = [" ".join(texts.choices(WORDS, k=texts.randint(4, 24))) for _ in range(120)]
    chats = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": a}] for n, a in enumerate(answers)
    ]
    folder.mkdir(parents=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = train_tokenizer(iter(answers), vocab_size=VOCAB_SIZE)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe: dict[str, dict[str, Any]] = {
        "model": {"source": str(folder / "model"), "dtype": "float32"},
        "parallel": {"fsdp_size": 2},
        "data": {"train": [str(folder / "chats.jsonl")], "seq_len": 64, "long_rows": "split"},
        "optim": {"lr": 0.01, "warmup_steps": 1},
        "train": {"steps": 8, "grad_accum_steps": 2, "activation_checkpointing": "full"},
        "checkpoint": {"reload_export": False},
        "log": {"wandb": "off"},
    }
    for section, values in sections.items():
        recipe.setdefault(section, {}).update(values)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(recipe: Path, run_dir: Path, *overrides: str) -> list[str]:
    words = [sys.executable, "-m", "moe_recipes.launch.cli", "train", str(recipe), "--cpu"]
    for override in (f"run_dir={run_dir}", *overrides):
        words += ["--set", override]
    return words


def train(
    recipe: Path, run_dir: Path, *overrides: str, meanwhile: Callable[[int], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``moe-recipes train`` to its end; ``meanwhile`` is called with the process id while it runs."""
    process = subprocess.Popen(
        command(recipe, run_dir, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        if meanwhile is not None:
            meanwhile(process.pid)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def rank_pid(launcher_pid: int, rank: int) -> int:
    """Process id of a rank of a running launcher."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher_pid and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"process {launcher_pid} has no rank {rank}")


def when_step(run_dir: Path, step: int, act: Callable[[int], None]) -> Callable[[int], None]:
    """For ``meanwhile``: wait until ``step`` stands in metrics.jsonl, then call ``act`` with the process id."""

    def wait(pid: int) -> None:
        limit = time.monotonic() + TIMEOUT_S
        while not (done := steps(run_dir)) or done[-1] < step:
            assert time.monotonic() < limit, f"{run_dir} did not reach step {step}"
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z", "the run ended early"
            time.sleep(0.01)
        act(pid)

    return wait


def signal_rank(rank: int, signum: signal.Signals) -> Callable[[int], None]:
    return lambda launcher_pid: os.kill(rank_pid(launcher_pid, rank), signum)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = RunFolder(run_dir).metrics
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in records(run_dir)]


def trained(run_dir: Path) -> list[dict[str, Any]]:
    """What must be equal bit for bit between two runs: every step's record without times and memory."""
    return [
        {key: value for key, value in record.items() if not key.endswith(("_s", "_per_gpu", "_gib", "mfu"))}
        for record in records(run_dir)
    ]


def exported_files(run_dir: Path) -> dict[str, bytes]:
    """Name and bytes of everything in ``RUN/export`` but its record, which holds times."""
    return {
        path.name: path.read_bytes() for path in sorted((run_dir / "export").iterdir()) if path.name != "EXPORT.json"
    }


def events(run_dir: Path, kind: str) -> list[dict]:
    """The events of one kind that a run noted, oldest first."""
    found = [json.loads(line) for line in RunFolder(run_dir).events.read_text().splitlines()]
    return [event for event in found if event["event"] == kind]
