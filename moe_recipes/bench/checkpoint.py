"""How long a save stops training, against what host memory alone allows: ``python -m moe_recipes.bench.checkpoint``.

    python -m moe_recipes.bench.checkpoint DIR [--gib 1.0] [--repeats 5] [--json]

One process saves as much as one rank would, at once and beside the training, to DIR, and removes it. The figures are of
this host, its device and the file system of DIR.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.checkpoint.staging import Staging, staging_bytes
from moe_recipes.checkpoint.store import load_checkpoint, save_checkpoint
from moe_recipes.config.errors import CannotWriteError, MissingInputError, RecipeError
from moe_recipes.launch.cli import guarded
from moe_recipes.runtime.host_memory import free_bytes
from moe_recipes.runtime.sharding import Rows

TENSOR_BYTES = 64 * 2**20
COPIES = 3
"""In memory at once: what is saved, its staging, and the target of the bare copy."""


def make_entries(num_bytes: int, device: torch.device) -> dict[str, Entry]:
    """bfloat16 tensors of 64 MiB, as many as make up ``num_bytes``, at least one."""
    entries = {}
    for index in range(max(1, round(num_bytes / TENSOR_BYTES))):
        tensor = torch.full((TENSOR_BYTES // 2 // 1024, 1024), float(index), dtype=torch.bfloat16, device=device)
        shape = tuple(tensor.shape)
        entries[f"w{index}"] = Entry(tensor=tensor, rows=Rows(start=0, count=shape[0], shape=shape, primary=True))
    return entries


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bare_copy(entries: dict[str, Entry], device: torch.device) -> Callable[[], None]:
    """A copy of as many bytes into buffers of its own: what the hardware allows."""
    sources = [entry.tensor for entry in entries.values()]
    targets = [torch.zeros(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda") for t in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)

    copy()
    return copy


def measure(folder: Path, num_bytes: int, *, repeats: int) -> dict[str, Any]:
    """Seconds of saves of about ``num_bytes``, each the median of ``repeats``, and rates in 10^9 bytes a second. Loads
    come from the page cache where it holds them.

    Raises:
        CannotWriteError: ``folder`` is there, or cannot be written.
        RecipeError: so much memory is not free.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if num_bytes * COPIES > 0.9 * free_bytes():
        raise RecipeError(
            f"--gib: {COPIES} copies of {num_bytes / 2**30:.1f} GiB do not fit into host memory; lower it"
        )
    if folder.exists():
        raise CannotWriteError(f"{folder} is there; name a new folder, which is removed afterwards")
    entries = make_entries(num_bytes, device)
    size = staging_bytes(entries)
    try:
        times = save_times(folder, entries, device, repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "bytes": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        **medians,
        "bare_copy_gb_per_s": size / 1e9 / medians["bare_copy_s"],
        "blocking_over_bare_copy": medians["blocking_s"] / medians["bare_copy_s"],
        "blocking_over_at_once": medians["blocking_s"] / medians["at_once_s"],
        "save_gb_per_s": size / 1e9 / medians["at_once_s"],
        "background_gb_per_s": size / 1e9 / medians["background_s"],
        "load_gb_per_s": size / 1e9 / medians["load_s"],
        "all": times,
    }


def save_times(folder: Path, entries: dict[str, Entry], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of saves at once, bare copies, copies of saves beside, from these until all is durable, and loads."""
    alone: dict[str, Any] = {"barrier": lambda: None, "agree": bool, "rank": 0, "num_ranks": 1}
    save = functools.partial(save_checkpoint, folder, rank_tensors={}, state={}, identity={}, **alone)
    staging = Staging(entries)
    staging.copy(entries)  # the first copy also makes the pages
    bare = bare_copy(entries, device)
    kinds = ("bare_copy_s", "blocking_s", "background_s", "at_once_s", "load_s")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ThreadPoolExecutor(max_workers=1) as thread:
        for step in range(1, repeats + 1):
            times["at_once_s"].append(seconds_of(lambda step=step: save(2 * step, entries=entries), device))
            times["bare_copy_s"].append(seconds_of(bare, device))
            start = time.perf_counter()
            copied = staging.copy(entries)
            times["blocking_s"].append(time.perf_counter() - start)
            path = thread.submit(save, 2 * step + 1, entries=copied).result()
            times["background_s"].append(time.perf_counter() - start)
            load = functools.partial(load_checkpoint, path, entries=copied, rank_tensors={}, identity={})
            times["load_s"].append(seconds_of(lambda load=load: load(rank=0, num_ranks=1), device))
            shutil.rmtree(folder)
    return times


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.checkpoint")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder on the file system to measure")
    parser.add_argument("--gib", type=float, default=1.0, help="what one rank saves (default 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="answer on stdout in JSON")
    options = parser.parse_args(words)
    if options.gib <= 0 or options.repeats < 1:
        raise RecipeError(f"--gib {options.gib} must be above 0, --repeats {options.repeats} at least 1")
    if not options.folder.absolute().parent.is_dir():
        raise MissingInputError(f"{options.folder.absolute().parent}: no such folder; make it first")
    found = measure(options.folder.absolute(), int(options.gib * 2**30), repeats=options.repeats)
    if options.json:
        print(json.dumps({**found, "host_cpus": os.cpu_count()}, indent=2))
        return 0
    print(f"{found['bytes'] / 1e9:.2f} GB on {found['device']}, {found['threads']} threads")
    print(f"bare copy      {found['bare_copy_s']:8.3f} s  {found['bare_copy_gb_per_s']:8.2f} GB/s")
    print(f"training stops {found['blocking_s']:8.3f} s  {found['blocking_over_bare_copy']:8.2f} bare copies")
    print(f"written after  {found['background_s']:8.3f} s  {found['background_gb_per_s']:8.2f} GB/s")
    print(f"at once        {found['at_once_s']:8.3f} s  {found['save_gb_per_s']:8.2f} GB/s")
    print(f"load           {found['load_s']:8.3f} s  {found['load_gb_per_s']:8.2f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: _run(sys.argv[1:]), as_json="--json" in sys.argv))
