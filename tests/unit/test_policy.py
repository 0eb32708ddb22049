"""What follows from a cause: the exit-code contract, and the end of a crash loop."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.cluster import Limits
from moe_recipes.launch.slurm.causes import KIND_OF_CODE, Cause, Kind
from moe_recipes.launch.slurm.policy import decide, restarts_without_progress

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(max_restarts_without_progress=3)


def end(restart: int, first: int = 0, durable: int = 0, job: str = "7") -> dict[str, Any]:
    return {"event": "end", "job": job, "restart": restart, "first_step": first, "durable_step": durable}


def cause(kind: Kind, code: int, node: str | None = None) -> Cause:
    return Cause(kind=kind, exit_code=code, message="because", node=node)


@pytest.mark.parametrize(
    ("kind", "code", "action", "exit_code", "excludes"),
    [
        ("done", 0, "done", 0, False),
        ("not_finite", 17, "fail", 17, False),
        ("out_of_memory", 20, "fail", 20, False),
        ("user_error", 64, "fail", 64, False),
        ("user_error", 65, "fail", 65, False),
        ("user_error", 66, "fail", 66, False),
        ("node_failure", 69, "requeue", 69, True),
        ("infrastructure", 69, "requeue", 69, True),
        ("hang", 70, "requeue", 70, True),
        ("internal", 70, "requeue", 70, False),
        ("cannot_write", 73, "fail", 73, False),
        ("corrupt", 74, "fail", 74, False),
        ("preempted", 75, "requeue", 75, False),
        ("time_limit", 75, "requeue", 75, False),
        ("user_error", 77, "fail", 77, False),
        ("environment", 78, "fail", 78, False),
        ("stopped_by_operator", 75, "fail", 93, False),
    ],
)
def test_the_contract(kind: Kind, code: int, action: str, exit_code: int, excludes: bool) -> None:
    decision = decide(cause(kind, code, "node3"), [end(0, 0, 5)], LIMITS)
    assert (decision.action, decision.exit_code) == (action, exit_code)
    assert decision.exclude == ("node3" if excludes else None)
    assert "because" in decision.reason


def test_three_restarts_without_a_newer_durable_step_are_held() -> None:
    ends = [end(restart) for restart in range(4)]
    failed = cause("infrastructure", 69, "node1")
    assert [decide(failed, ends[:n], LIMITS).action for n in (1, 2, 3)] == ["requeue"] * 3
    held = decide(failed, ends, LIMITS)
    assert (held.action, held.exit_code, held.exclude) == ("hold", 93, "node1")
    assert held.reason == "3 restarts without a newer durable step; the last: because"
    assert decide(cause("preempted", 75), ends, LIMITS).action == "hold"
    assert decide(cause("done", 0), ends, LIMITS).action == "done"
    assert decide(cause("not_finite", 17), ends, LIMITS).exit_code == 17


def test_a_newer_durable_step_starts_the_count_again() -> None:
    ends = [end(0), end(1), end(2), end(3, 0, 10), end(4, 10, 10), end(5, 10, 10)]
    assert [restarts_without_progress(ends[: n + 1]) for n in range(6)] == [0, 1, 2, 0, 1, 2]
    assert restarts_without_progress([*ends, end(6, 10, 10)]) == 3


def test_another_job_and_a_release_start_the_count_again() -> None:
    ends = [end(restart) for restart in range(4)]
    assert restarts_without_progress([*ends, end(0, job="8")]) == 0
    released = [*ends, {"event": "hold", "job": "7"}, end(5)]
    assert restarts_without_progress(released) == 0
    assert restarts_without_progress([*released, end(6)]) == 1
    assert restarts_without_progress([]) == 0


def test_every_code_and_kind_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \|[^|]*\| ([^|]*) \|", text, re.MULTILINE)
    told = {(int(code), kind) for code, kinds in rows for kind in re.findall(r"`(\w+)`", kinds)}
    pairs = {(code, kind) for code, kind in KIND_OF_CODE.items()}
    pairs |= {(75, "time_limit"), (69, "node_failure"), (70, "hang"), (93, "stopped_by_operator")}
    assert told == pairs
    assert {kind for _, kind in pairs} == {*typing.get_args(Kind)}
