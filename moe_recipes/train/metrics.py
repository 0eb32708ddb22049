"""What a step measured: the JSON line, the line on the screen, and the same numbers to W&B."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_recipes.moe.expert_load import dead_experts, max_violations
from moe_recipes.runtime.files import replace_durably

if TYPE_CHECKING:
    from moe_recipes.train.loop import StepStats
    from moe_recipes.train.run import Run

logger = logging.getLogger("moe_recipes")
GIB = 1 << 30


def device_memory(device: torch.device) -> dict[str, float]:
    """Peak GiB since the last reset, on this rank: allocated by tensors, reserved by the allocator; 0 on the CPU."""
    if device.type != "cuda":
        return {"memory_allocated_gib": 0.0, "memory_reserved_gib": 0.0}
    return {
        "memory_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def balance_record(run: Run, stats: StepStats) -> dict[str, Any]:
    """What metrics.jsonl says of a step's extra losses and of its experts' load; layers by number."""
    train = run.recipe.train
    wanted = {
        "aux_loss": train.router_aux_loss_coef > 0,
        "z_loss": train.router_z_loss_coef > 0,
        "mtp_loss": run.mtp_coef > 0,
    }
    record: dict[str, Any] = {name: getattr(stats, name) for name, there in wanted.items() if there}
    if run.load is None or stats.expert_counts is None:
        return record
    counts, layers = stats.expert_counts, run.load.layers
    violations, dead = max_violations(counts), dead_experts(counts)
    record["max_violation"] = float(violations.max())
    record["dead_experts"] = int(dead.sum())
    record["max_violation_of_layer"] = {n: round(v, 4) for n, v in zip(layers, violations.tolist(), strict=True)}
    record["dead_experts_of_layer"] = dict(zip(layers, dead.tolist(), strict=True))
    every = run.recipe.log.expert_load_every_steps
    if every and (run.step % every == 0 or run.step == 1):
        record["expert_load"] = dict(zip(layers, counts.tolist(), strict=True))
    return record


class Metrics:
    """Writer of ``metrics.jsonl``; the file is the truth, everything else gets a copy. Rank 0 only.

    A resumed run continues at its checkpoint, so steps that were logged beyond it are dropped here first: each step
    stands in the file once.
    """

    def __init__(self, path: Path, *, first_step: int, total_steps: int) -> None:
        self.path, self.total_steps = path, total_steps
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if line and _step(line) <= first_step]
            replace_durably(path, "".join(f"{line}\n" for line in kept).encode())
        self.file = path.open("a", buffering=1)
        self.durations: deque[float] = deque(maxlen=50)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")

    def line(self, record: dict[str, Any]) -> str:
        """One aligned line for people."""
        self.durations.append(record["step_s"])
        step, total = record["step"], self.total_steps
        left_s = (total - step) * sum(self.durations) / len(self.durations)
        done = round(20 * step / total)
        bar = "=" * max(0, done - 1) + (">" if 0 < done < 20 else "=" if done else "") + "." * (20 - done)
        parts = [
            f"step {step:>{len(str(total))}}/{total} [{bar}]",
            f"loss {record['loss']:8.4f}",
            f"grad_norm {record['grad_norm']:8.3f}",
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_s_per_gpu']:9,.0f} tok/s/{'GPU' if record['gpu'] else 'rank'}",
        ]
        if record["mfu"] is not None:
            parts.append(f"MFU {100 * record['mfu']:4.1f}%")
        if record["gpu"]:
            parts.append(f"mem {record['memory_allocated_gib']:5.1f} GiB")
        if record.get("max_violation") is not None:
            parts.append(f"max violation {record['max_violation']:5.2f}")
        minutes, seconds = divmod(round(left_s), 60)
        parts.append(f"left {minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}")
        return " | ".join(parts)

    def close(self) -> None:
        self.file.close()


def _step(line: str) -> int:
    """Step of a JSON line; a line that a kill cut short counts as beyond any step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 1 << 62
