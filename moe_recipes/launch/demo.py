"""The demo: make data, train, stop half-way by SIGTERM, resume, check the curve, draw it, load the export.

python -m moe_recipes.launch.demo      (or `make demo`; MOE_DEMO_CPU=1 stays on the CPU)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from moe_recipes.config.checks import check_recipe
from moe_recipes.config.errors import (
    EXIT_REQUEUE,
    CannotWriteError,
    InfrastructureError,
    MoeRecipesError,
    NotFiniteError,
)
from moe_recipes.config.resolve import load_recipe
from moe_recipes.config.run_folder import RunFolder, run_folder_of

RECIPE = "recipes/tiny_cpu.yaml"
DATA_DIR = "runs/demo-data"
MIN_LOSS_FALL = 1.5
"""Nats a label token. The loss starts near log(2048) = 7.6, an even guess over the vocabulary."""

COMPARED_STEPS = 10
PHASE_LIMIT_S = 600.0
STOP_LIMIT_S = 120.0


class ChildFailed(MoeRecipesError):
    """A command of the demo ended with another code than it should; this carries the code on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def layout_options(num_gpus: int, *, cpu: bool) -> list[str]:
    """Options of ``train`` for this host. One GPU takes both ranks' rows, so that a step is the same everywhere."""
    if cpu or num_gpus == 0:
        return ["--cpu"]
    if num_gpus == 1:
        changes = ("parallel.fsdp_size=1", "parallel.ep_size=1", "train.micro_batch_size=4")
        return [word for change in changes for word in ("--set", change)]
    return []


def count_gpus() -> int:
    """GPUs of this host by ``nvidia-smi -L``; 0 without it."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def remove_old_run(folder: RunFolder) -> None:
    """Delete the folder of an earlier demo.

    Raises:
        CannotWriteError: there is something at its place that is no run of this package.
    """
    if not folder.path.exists():
        return
    try:
        ours = "moe_recipes" in json.loads(folder.manifest.read_bytes())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise CannotWriteError(f"{folder.path} is there, but is no run of moe-recipes; move it away")
    shutil.rmtree(folder.path)


def run(words: Sequence[str]) -> None:
    """Run one command in the foreground.

    Raises:
        ChildFailed: it did not end with 0.
    """
    _heading(" ".join(words))
    code = subprocess.run([sys.executable, *words], check=False, timeout=PHASE_LIMIT_S).returncode
    if code != 0:
        raise ChildFailed(f"`python {' '.join(words)}` ended with {code}", abs(code))


def steps_done(metrics: Path) -> list[int]:
    """Steps of the complete lines of metrics.jsonl; a line that is being written is left out."""
    if not metrics.exists():
        return []
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def train_until(words: Sequence[str], metrics: Path, *, stop_step: int) -> None:
    """Train, send SIGTERM when ``stop_step`` is written, and expect exit code 75: saved, start me again.

    Raises:
        ChildFailed: it ended by itself, or with another code. InfrastructureError: it did not get there in time.
    """
    _heading(f"{' '.join(words)}   (SIGTERM comes after step {stop_step})")
    process = subprocess.Popen([sys.executable, *words])
    limit = time.monotonic() + PHASE_LIMIT_S
    try:
        while process.poll() is None and max(steps_done(metrics), default=0) < stop_step:
            if time.monotonic() > limit:
                raise InfrastructureError(f"training did not reach step {stop_step} in {PHASE_LIMIT_S:.0f} s")
            time.sleep(0.2)
        if process.poll() is not None:
            raise ChildFailed(
                f"training ended with {process.returncode} before step {stop_step}", abs(process.returncode) or 70
            )
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=STOP_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(f"training did not stop within {STOP_LIMIT_S:.0f} s after SIGTERM") from error
    finally:
        if process.poll() is None:
            process.kill()
    if code != EXIT_REQUEUE:
        raise ChildFailed(f"training ended with {code} after SIGTERM, not with {EXIT_REQUEUE}", abs(code) or 70)


def check_curve(metrics: Path, *, num_steps: int) -> tuple[float, float]:
    """Mean loss of the first and of the last steps, after checking that the two starts make one curve.

    Raises:
        NotFiniteError: a step is missing or there twice, or the loss fell too little.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record["step"] for record in records]
    if steps != list(range(1, num_steps + 1)):
        wrong = sorted(set(range(1, num_steps + 1)) ^ set(steps)) or sorted({s for s in steps if steps.count(s) > 1})
        raise NotFiniteError(
            f"{metrics} must have steps 1 to {num_steps} once each and in order, but has {len(steps)} lines;"
            f" missing, foreign or repeated: {wrong[:10]}"
        )
    losses = [record["loss"] for record in records]
    first = sum(losses[:COMPARED_STEPS]) / COMPARED_STEPS
    last = sum(losses[-COMPARED_STEPS:]) / COMPARED_STEPS
    if not first - last >= MIN_LOSS_FALL:
        raise NotFiniteError(f"the loss went from {first:.3f} to {last:.3f}, a fall of less than {MIN_LOSS_FALL}")
    return first, last


def demo() -> None:
    """Run all parts in order.

    Raises:
        MoeRecipesError: the first part that failed.
    """
    started = time.monotonic()
    options = layout_options(count_gpus(), cpu=bool(os.environ.get("MOE_DEMO_CPU")))
    overrides = [word for flag, word in pairwise(options) if flag == "--set"]
    recipe = load_recipe(RECIPE, overrides)
    check_recipe(recipe)
    folder = run_folder_of(recipe)
    remove_old_run(folder)
    run(["-m", "moe_recipes.data.stdlib_chats", DATA_DIR])
    train = ["-m", "moe_recipes.launch.cli", "train", RECIPE, *options]
    train_until(train, folder.metrics, stop_step=recipe.train.steps // 2)
    stopped_at = max(steps_done(folder.metrics))
    run(train)
    first, last = check_curve(folder.metrics, num_steps=recipe.train.steps)
    run(["-m", "moe_recipes.bench.pictures", str(folder.path)])
    run(["-m", "moe_recipes.models.check_export", str(folder.path)])
    _heading(f"the demo took {time.monotonic() - started:.0f} s and left")
    for path in sorted(item for item in folder.path.rglob("*") if item.is_file() and not item.is_symlink()):
        print(f"{path.stat().st_size:>12,} bytes  {path}")
    print(
        f"\nloss {first:.3f} -> {last:.3f} (means of {COMPARED_STEPS} steps); stopped by SIGTERM after step"
        f" {stopped_at}, resumed; each of the {recipe.train.steps} steps is there once"
    )


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main() -> int:
    try:
        demo()
    except MoeRecipesError as error:
        print(f"moe-recipes: error: the demo failed: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.TimeoutExpired as error:
        print(f"moe-recipes: error: the demo failed: {error}", file=sys.stderr)
        return InfrastructureError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
