"""The odd rank of a hang, from the stacks of real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.launch.slurm.stacks import log_sizes, new_stacks, odd_rank

CHILD = """
import faulthandler, json, os, signal, sys, threading, time
faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def reading_a_bad_disk():
    time.sleep(60)
def all_reduce():
    time.sleep(60)
open(sys.argv[1], "w").close()
{}()
"""


def stacks_of(attempt: Path, functions: list[str | None]) -> dict[int, Any]:
    """Real stacks of real processes; None for one that is stopped. Their files pretend to lie in torch/distributed."""
    ranks = []
    for rank, function in enumerate(functions):
        package = attempt / ("torch/distributed" if function == "all_reduce" else "mine")
        package.mkdir(parents=True, exist_ok=True)
        script, ready = package / "child.py", attempt / f"ready{rank}"
        script.write_text(CHILD.format(function or "reading_a_bad_disk"))
        with (attempt / f"rank-{rank:05d}.log").open("w") as log:
            log.write("Current thread 0x00 (most recent call first):\n  an older dump\n")
            ranks.append(subprocess.Popen([sys.executable, script, ready], stderr=log))
    try:
        while not all((attempt / f"ready{rank}").exists() for rank in range(len(ranks))):
            time.sleep(0.02)
        before = log_sizes(attempt)
        for process, function in zip(ranks, functions, strict=True):
            process.send_signal(signal.SIGSTOP if function is None else signal.SIGUSR1)
        answers = sum(function is not None for function in functions)
        limit = time.monotonic() + 20
        while sum(map(bool, (stacks := new_stacks(attempt, before)).values())) < answers and time.monotonic() < limit:
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return stacks


@pytest.mark.parametrize(
    ("functions", "odd", "does"),
    [
        (["all_reduce", "reading_a_bad_disk", "all_reduce"], 1, "reading_a_bad_disk while the others wait for it"),
        (["reading_a_bad_disk", "all_reduce"], 0, "reading_a_bad_disk while the others wait for it"),
        (["all_reduce", "all_reduce", None], 2, "does not answer"),
        (["reading_a_bad_disk", "reading_a_bad_disk"], None, ""),
        (["all_reduce", "all_reduce"], None, ""),
        ([None, None], None, ""),
    ],
)
def test_the_odd_rank_of_a_hang(tmp_path: Path, functions: list[str | None], odd: int | None, does: str) -> None:
    found = odd_rank(stacks_of(tmp_path, functions))
    assert (found[0] if found else None) == odd
    assert does in (found[1] if found else "")
