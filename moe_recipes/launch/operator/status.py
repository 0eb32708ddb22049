"""The verb ``status``: where a run stands, from the files that it keeps and one question to Slurm."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from moe_recipes.config.errors import EXIT_OK
from moe_recipes.launch.operator.facts import End, RunFacts, now_s, seconds_of
from moe_recipes.launch.operator.find import Found, add_target, find_run
from moe_recipes.launch.operator.slurm import job_state
from moe_recipes.plan.saves import save_interval_s

RECENT_SAVES = 5
GB, LEAST_S = 1e9, 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)


def run(options: argparse.Namespace) -> int:
    report = status_of(find_run(options.run, options.runs))
    print(json.dumps(report, indent=2) if options.json else "\n".join(lines_of(report)))
    return EXIT_OK


def status_of(found: Found) -> dict[str, Any]:
    """Everything that ``status`` says, as plain data. Times are seconds; what is not known is None.

    ``goodput`` is the time in steps that counted over the wall time since the first start. A step counts once, and
    not at all if the run ended before a checkpoint had it. A run that has ended takes no more wall time.
    """
    facts = RunFacts(found.folder)
    status, steps, now = facts.status, facts.steps, now_s()
    recipe = facts.recipe
    step = int(status.get("step") or 0)
    reported_s = seconds_of(status.get("time"))
    counted_s = steps.seconds_up_to(facts.durable_step if facts.is_over else step)
    until_s = reported_s if facts.is_over and reported_s else now
    wall_s = None if facts.first_start_s is None else max(until_s - facts.first_start_s, 0.0)
    job = found.job or facts.job
    seen = job_state(job) if job else None
    end = facts.last_end
    return {
        "run": str(found.folder.path),
        "state": facts.state,
        "cause": status.get("cause"),
        "exit_code": status.get("exit_code"),
        "job": job,
        "job_state": seen.state if seen else None,
        "job_reason": seen.reason if seen and seen.reason != "None" else None,
        "attempt": facts.attempt,
        "nodes": facts.nodes,
        "step": step,
        "steps": recipe["train"]["steps"],
        "loss": steps.last.get("loss"),
        "step_s": steps.recent_s,
        "eta_s": None if facts.state == "done" else eta_s(facts, step),
        "reported_s": None if reported_s is None else max(now - reported_s, 0.0),
        "durable_step": facts.durable_step,
        "since_durable_s": since_durable_s(facts, now),
        **save_numbers(facts),
        "restarts": max(len(facts.attempts) - 1, 0),
        "counted_s": counted_s,
        "wall_s": wall_s,
        "goodput": counted_s / wall_s if wall_s else None,
        "verdict": dataclasses.asdict(end) if end else None,
    }


def eta_s(facts: RunFacts, step: int) -> float | None:
    """Seconds of training that are left: steps at their recent speed, and saves that stop it as the last did."""
    each = facts.steps.recent_s
    if each is None:
        return None
    left = max(int(facts.recipe["train"]["steps"]) - step, 0)
    every = int(facts.recipe["checkpoint"]["every_steps"] or 0)
    last = facts.saves[-1] if facts.saves else {}
    last_save_s = float(last.get("blocking_s", last.get("seconds")) or 0.0)
    saves = (step + left) // every - step // every if every else min(left, 1)
    return left * each + saves * last_save_s


def save_numbers(facts: RunFacts) -> dict[str, float | None]:
    """Of the newest saves, and of the newest load: seconds, 10^9 bytes a second; and seconds between saves at which a
    run loses least, by the recipe's ``checkpoint.mtbf_hours``. None for what is not known yet."""
    newest = [save for save in facts.saves if "blocking_s" in save][-RECENT_SAVES:]
    loads = [event for event in facts.events if event.get("event") == "resume" and event.get("seconds")]
    blocking_s = _mean(save["blocking_s"] for save in newest)
    hours = facts.recipe["checkpoint"]["mtbf_hours"]
    return {
        "save_s": _mean(save["seconds"] for save in newest),
        "blocking_s": blocking_s,
        "save_gb_per_s": _mean(save["bytes"] / GB / max(save["seconds"], LEAST_S) for save in newest),
        "load_gb_per_s": _mean(load["bytes"] / GB / max(load["seconds"], LEAST_S) for load in loads[-1:]),
        "save_every_s": save_interval_s(blocking_s, mtbf_hours=hours) if blocking_s and hours else None,
    }


def _mean(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return sum(found) / len(found) if found else None


def since_durable_s(facts: RunFacts, now: float) -> float | None:
    """Seconds since the newest checkpoint became durable; since the first start where there is none yet."""
    stamps = [seconds_of(save.get("time")) for save in facts.saves if save.get("step") == facts.durable_step]
    last = stamps[-1] if stamps else facts.first_start_s
    return None if last is None else max(now - last, 0.0)


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for people, one fact a line."""
    step, steps = report["step"], report["steps"]
    rows = {
        "run": report["run"],
        "state": _state(report),
        "attempt": f"{report['attempt'] or 'none yet'} on {','.join(report['nodes']) or 'no node'}",
        "step": f"{step} of {steps}, {100 * step / steps:.1f}%",
        "loss": "none yet" if report["loss"] is None else f"{report['loss']:.4f}",
        "left": _left(report),
        "durable": _durable(report),
        **({"saves": _saves(report)} if report["save_s"] is not None else {}),
        "restarts": str(report["restarts"]),
        "goodput": _goodput(report),
        "verdict": _verdict(report["verdict"]),
    }
    return [f"{name:<9} {text}" for name, text in rows.items()]


def _state(report: dict[str, Any]) -> str:
    words = [report["state"]]
    if report["reported_s"] is not None:
        words.append(f"{duration(report['reported_s'])} ago")
    if report["job"]:
        reason = f" ({report['job_reason']})" if report["job_reason"] else ""
        words.append(f"job {report['job']} {report['job_state'] or 'is not in squeue'}{reason}")
    return ", ".join(words)


def _left(report: dict[str, Any]) -> str:
    if report["state"] == "done":
        return "nothing"
    if report["eta_s"] is None:
        return "unknown before the first step"
    return f"{duration(report['eta_s'])} of training, {report['step_s']:.2f} s a step"


def _durable(report: dict[str, Any]) -> str:
    since = "" if report["since_durable_s"] is None else f", {duration(report['since_durable_s'])} ago"
    return f"step {report['durable_step']}{since}" if report["durable_step"] else "no checkpoint yet"


def _saves(report: dict[str, Any]) -> str:
    words = [f"{report['save_s']:.1f} s at {report['save_gb_per_s']:.2f} GB/s"]
    words.append(f"training stands {report['blocking_s']:.1f} s")
    if report["load_gb_per_s"] is not None:
        words.append(f"loads {report['load_gb_per_s']:.2f} GB/s")
    if report["save_every_s"] is not None:
        words.append(f"save every {duration(report['save_every_s'])} to lose least")
    return ", ".join(words)


def _goodput(report: dict[str, Any]) -> str:
    if report["goodput"] is None:
        return "unknown"
    wall, counted = duration(report["wall_s"]), duration(report["counted_s"])
    return f"{100 * report['goodput']:.1f}%: {counted} in steps that count, of {wall} since the first start"


def _verdict(end: dict[str, Any] | None) -> str:
    if end is None:
        return "no attempt has ended"
    what = f"attempt {end['attempt']}: {end['kind']}, exit {end['exit_code']}"
    return verdict_line(what, End(**end))


def verdict_line(what: str, end: End) -> str:
    """``what``, the cause, and what the supervisor did then."""
    cause = f": {end.cause}" if end.cause else ""
    return f"{what}{cause}{f'; then {end.next}' if end.next else ''}"


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
