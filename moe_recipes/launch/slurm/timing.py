"""How long things take in this run: from its own files, so that signals and limits follow what was measured.

metrics.jsonl has ``step_s`` (and ``validation_s``) of every step, events.jsonl has ``seconds`` of every checkpoint, and
the time from a ``start`` to its ``first step`` is the start-up. Before anything was measured, estimates from the size
of the model and the stated rate of the file system stand in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_recipes.config.cluster import Limits
from moe_recipes.config.errors import MoeRecipesError, RecipeError
from moe_recipes.config.model_config import read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.plan.parameters import count_parameters

MARGIN_S = 60.0
"""Slurm may notice a limit this much too early or late, and clocks differ."""

DEFAULT_GB_PER_S = 1.0
"""Rate of a node to and from the file system where the cluster file gives none; 10^9 bytes a second."""

DEFAULT_STEP_S, DEFAULT_STARTUP_S, DEFAULT_SAVE_S = 30.0, 30.0, 300.0
LEAST_HANG_S = 600.0
HANG_STEPS = 10
"""A hang is this many times the longest step without one."""

TAIL_BYTES = 64 << 20
"""Of a longer metrics.jsonl only the end is read; the longest step of the last days is what counts."""

_SECONDS = re.compile(rb'"(step_s|validation_s)": ([0-9.eE+-]+)')


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds; the longest seen, or an estimate."""

    startup_s: float = DEFAULT_STARTUP_S
    """From the start of an attempt to the end of its first step, the container's start included."""

    step_s: float = DEFAULT_STEP_S
    """One step with its validation."""

    save_s: float = DEFAULT_SAVE_S

    @property
    def signal_lead_s(self) -> float:
        """How long before its end a job must be told: the running step ends, then all is saved, with room to spare."""
        return MARGIN_S + self.step_s + 2 * self.save_s

    @property
    def least_walltime_s(self) -> float:
        """What an attempt needs to leave anything behind: start-up with one step, and a save."""
        return self.startup_s + self.step_s + self.save_s


def signal_lead_s(folder: RunFolder, estimate: Times | None = None) -> float:
    """Seconds before the end of the job at which its ranks get the signal: 60 + longest step + 2 x longest save.

    Args:
        estimate: what stands in for anything that the run has not measured yet.
    """
    return measured_times(folder, estimate).signal_lead_s


def estimated_times(recipe: Recipe, limits: Limits, num_nodes: int) -> Times:
    """Times before any measurement, from the bytes that every node reads and writes. The defaults where the model's
    config is not here or its parameters are not counted."""
    try:
        config, _, _ = read_model_config(recipe.model)
    except MoeRecipesError:
        return Times()
    count = count_parameters(config)
    if count is None:
        return Times()
    exact = recipe.model.dtype == "float32"
    bytes_per_s = 1e9 * (limits.checkpoint_gb_per_s or DEFAULT_GB_PER_S) * num_nodes
    read_s, save_s = (count.trained * size / bytes_per_s for size in ((4, 12) if exact else (2, 8)))
    return Times(startup_s=DEFAULT_STARTUP_S + read_s, save_s=5.0 + save_s)


def measured_times(folder: RunFolder, estimate: Times | None = None) -> Times:
    """The longest step, save and start-up of the run so far; the estimate's for what was not measured."""
    estimate = estimate or Times()
    events = list(_events(folder))
    saves = [float(e["seconds"]) for e in events if e["event"] == "checkpoint" and _is_number(e.get("seconds"))]
    return Times(
        startup_s=max(_startups(events), default=estimate.startup_s),
        step_s=max(_step_seconds(folder.metrics), default=estimate.step_s),
        save_s=max(saves, default=estimate.save_s),
    )


def check_walltime(folder: RunFolder, remaining_s: float | None, estimate: Times | None = None) -> None:
    """Refuse a job that must end before it could save anything.

    Args:
        remaining_s: until Slurm ends the job; None without a limit.
    Raises:
        RecipeError: names the least time limit.
    """
    times = measured_times(folder, estimate)
    if remaining_s is None or remaining_s >= times.least_walltime_s:
        return
    minutes = math.ceil((times.least_walltime_s + MARGIN_S) / 60)
    raise RecipeError(
        f"the job ends in {remaining_s:.0f} s, but start-up ({times.startup_s:.0f} s), one step ({times.step_s:.0f} s)"
        f" and one save ({times.save_s:.0f} s) take {times.least_walltime_s:.0f} s; ask for at least"
        f" --time={minutes // 60:02d}:{minutes % 60:02d}:00 (slurm.time of the cluster file)"
    )


def hang_limit_s(limits: Limits, times: Times, last_event: str | None) -> float:
    """Seconds without any progress that count as a hang.

    Args:
        last_event: the newest event of this attempt in events.jsonl: before ``first step`` it is starting, after
            ``saving`` or ``exporting`` it is writing; both may take longer than a step.
    """
    if last_event in ("saving", "exporting"):
        return max(limits.hang_save_s, 3 * times.save_s)
    if is_starting(last_event):
        return max(limits.hang_start_s, 3 * times.startup_s)
    return limits.hang_s if limits.hang_s is not None else max(LEAST_HANG_S, HANG_STEPS * times.step_s)


def is_starting(last_event: str | None) -> bool:
    """The ranks of this attempt have not finished their first step."""
    return last_event in (None, "start", "resume")


def last_event(folder: RunFolder) -> str | None:
    """The newest event of the newest attempt that says what the ranks are doing."""
    known = ("start", "resume", "first step", "saving", "checkpoint", "exporting", "export", "done", "stopped")
    return next((event["event"] for event in reversed(list(_events(folder))) if event["event"] in known), None)


def _events(folder: RunFolder) -> Iterable[dict[str, Any]]:
    for line in _tail(folder.events).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event


def _startups(events: Iterable[dict[str, Any]]) -> list[float]:
    found, started = [], None
    for event in events:
        if event["event"] == "start":
            started = event.get("time")
        elif event["event"] == "first step" and started is not None:
            found.append(_seconds_between(started, event.get("time")))
            started = None
    return [seconds for seconds in found if seconds is not None and seconds > 0]


def _step_seconds(metrics: Path) -> list[float]:
    """Seconds of each step, with its validation. By pattern: a line can hold the loads of thousands of experts."""
    found: list[float] = []
    for line in _tail(metrics).splitlines():
        seconds = [float(match[2]) for match in _SECONDS.finditer(line)]
        if seconds and math.isfinite(sum(seconds)):
            found.append(sum(seconds))
    return found


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def _seconds_between(first: Any, second: Any) -> float | None:
    try:
        return (_time(second) - _time(first)).total_seconds()
    except ValueError:
        return None


def _time(stamp: Any) -> datetime:
    return datetime.fromisoformat(str(stamp).replace("Z", "+00:00"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
