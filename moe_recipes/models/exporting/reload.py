"""Who checked an export before it took its place: plain Transformers, and serving engines where they are installed.

Each runs in a process of its own, on rank 0 alone, while the other ranks wait. Transformers runs on the CPU, since the
trained model still fills the device, and only where the export fits into the free memory of the host:

    needed    1.25 times the bytes of all tensors, and 2 GiB
    refused   above what is free, or above ``LIMIT_GIB``, which would take longer than the other ranks can wait
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import EXIT_DOES_NOT_FIT, EXIT_NOT_FINITE, MissingInputError, NotFiniteError
from moe_recipes.models.exporting.plan import INDEX_NAME
from moe_recipes.runtime.host_memory import free_bytes

LIMIT_GIB = 256
RELOAD_TIMEOUT_S, ENGINE_TIMEOUT_S = 900, 300
"""All engines together stay below the 30 minutes after which a collective of the waiting ranks gives up."""

ENGINES = ("vllm", "sglang")
NOT_ASKED = "not asked for"
UNCERTIFIED = {"logits": NOT_ASKED, "engines": dict.fromkeys(("transformers", *ENGINES), NOT_ASKED)}
"""The certificate without a reload."""

OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def needed_bytes(tensor_bytes: int) -> int:
    """Host memory for loading an export in one process: its weights, one layer's experts twice, and the program."""
    return tensor_bytes + tensor_bytes // 4 + 2 * 2**30


def stored_bytes(export: Path) -> int:
    """Bytes of all tensors.

    Raises:
        MissingInputError: there is no export.
    """
    try:
        return int(json.loads((export / INDEX_NAME).read_bytes())["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MissingInputError(
            f"{export}: no finished export; export the run with `moe-recipes export RUN`"
        ) from error


def certificate(export: Path, run_dir: Path) -> dict[str, Any]:
    """``logits`` and ``engines`` of EXPORT.json, for a run that left its probe in ``run_dir``.

    Raises:
        NotFiniteError: the export does not load, or computes other logits than the trainer.
    """
    needed, free = needed_bytes(stored_bytes(export)), free_bytes()
    allowed = min(free, LIMIT_GIB * 2**30)
    if needed > allowed:
        found: Any = f"not reloaded, needs {_gib(needed)} GiB of host memory, {_gib(allowed)} GiB are free or allowed"
    else:
        found = _reload(export, run_dir)
    logits, engine = (found["logits"], found["engine"]) if isinstance(found, dict) else (found, found)
    return {"logits": logits, "engines": {"transformers": engine} | {name: _engine(name, export) for name in ENGINES}}


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def _environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OF_RANKS and not name.startswith("SLURM_")}
    return kept | changes


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no word"


def _reload(export: Path, run_dir: Path) -> dict[str, Any] | str:
    """What ``check_export`` found, or why it could not look."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        command = [sys.executable, "-m", "moe_recipes.models.check_export", str(run_dir)]
        command += ["--export", str(export), "--json", str(answer)]
        try:
            done = subprocess.run(
                command, env=_environment(CUDA_VISIBLE_DEVICES=""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", timeout=RELOAD_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not reloaded, took longer than {RELOAD_TIMEOUT_S} s"
        if done.returncode < 0:
            return f"not reloaded, the process was killed by signal {-done.returncode}"
        if done.returncode != 0:
            said = _last_words(done.stdout).removeprefix("moe-recipes: error: ")
            if done.returncode == EXIT_DOES_NOT_FIT:  # others took memory since it was looked at here
                return f"not reloaded, {said}"
            raise NotFiniteError(said if done.returncode == EXIT_NOT_FINITE else f"plain Transformers says: {said}")
        found: dict[str, Any] = json.loads(answer.read_bytes())
        return found


def _engine(name: str, export: Path) -> dict[str, Any] | str:
    """A serving engine's report. One that differs fails the export; one that does not start here is only recorded, as
    the trained model may fill the device."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:  # a folder of this name in the working directory is no package
        return "not installed"
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        command = [sys.executable, "-m", "moe_recipes.models.check_engines", name, str(export), "--json", str(answer)]
        try:
            done = subprocess.run(
                command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", timeout=ENGINE_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not run, took longer than {ENGINE_TIMEOUT_S} s"
        if not answer.is_file():
            return f"not run: {_last_words(done.stdout).removeprefix('moe-recipes: error: ')}"
        found: dict[str, Any] = json.loads(answer.read_bytes())
        if done.returncode == EXIT_NOT_FINITE:
            raise NotFiniteError(_last_words(done.stdout))
        return found
