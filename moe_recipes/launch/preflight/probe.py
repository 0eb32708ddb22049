"""One probe: a small function that looks at one thing of one node, and what it found."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from moe_recipes.config.errors import EXIT_INFRASTRUCTURE, EXIT_INTERNAL, MoeRecipesError, first_line

Verdict = Literal["pass", "fail", "not_available"]
JOB = "job"
"""The node of a probe that is about the whole job."""

TIME_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found. Plain data: value and floor are JSON."""

    name: str = ""
    node: str = ""
    verdict: Verdict
    value: Any = None
    floor: Any = None
    """The least (or, where the message says so, the most) that passes; None where there is no such number."""

    message: str = ""
    exit_code: int = EXIT_INFRASTRUCTURE
    """What a failure on every node ends with. On some nodes only, it is those nodes' fault: 69."""


ProbeFunction = Callable[[], Probe]


def passed(value: Any = None, *, floor: Any = None, message: str = "") -> Probe:
    return Probe(verdict="pass", value=value, floor=floor, message=message)


def failed(message: str, *, value: Any = None, floor: Any = None, exit_code: int = EXIT_INFRASTRUCTURE) -> Probe:
    return Probe(verdict="fail", value=value, floor=floor, message=message, exit_code=exit_code)


def not_available(message: str, *, value: Any = None) -> Probe:
    """The machine does not allow the question. Never a pass."""
    return Probe(verdict="not_available", value=value, message=message)


def at_least(value: float, floor: float, what: str) -> Probe:
    """Pass if ``value`` is not under ``floor``; ``what`` says what to do otherwise."""
    return passed(value, floor=floor) if value >= floor else failed(what, value=value, floor=floor)


def run_probes(
    probes: Mapping[str, ProbeFunction], *, node: str, time_limits_s: Mapping[str, float] | None = None
) -> list[Probe]:
    """Ask all probes side by side and wait for each at most its time limit: a file system that hangs holds up nothing.

    A probe that is late fails; its thread is left behind, so that the process should end with ``os._exit``.
    """
    limits = time_limits_s or {}
    answers: dict[str, Probe] = {}
    start = time.monotonic()
    threads = {name: _start(name, function, answers) for name, function in probes.items()}
    found = []
    for name, thread in threads.items():
        limit_s = limits.get(name, TIME_LIMIT_S)
        thread.join(max(0.0, start + limit_s - time.monotonic()))
        late = failed(f"no answer within {limit_s:g} s; the file system or device behind it may hang")
        found.append(replace(answers.get(name, late), name=name, node=node))
    return found


def _start(name: str, function: ProbeFunction, answers: dict[str, Probe]) -> threading.Thread:
    def ask() -> None:
        answers[name] = _guarded(function)

    thread = threading.Thread(target=ask, name=f"probe {name}", daemon=True)
    thread.start()
    return thread


def _guarded(function: ProbeFunction) -> Probe:
    try:
        return function()
    except MoeRecipesError as error:
        return failed(str(error), exit_code=error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return failed(f"{place}{error.strerror or first_line(error)}")
    except Exception as error:
        # One probe with a bug must not take the answers of the others with it.
        return failed(f"the probe itself failed: {type(error).__name__}: {first_line(error)}", exit_code=EXIT_INTERNAL)


def run_tool(words: Sequence[str], *, limit_s: float = 20.0) -> subprocess.CompletedProcess[str] | None:
    """Run a tool of the system; None if it is not there.

    Raises:
        OSError: it did not answer within ``limit_s`` seconds.
    """
    try:
        return subprocess.run(
            list(words), capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL, errors="replace"
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{words[0]} gave no answer within {limit_s:g} s") from error


def probe_to_dict(probe: Probe) -> dict[str, Any]:
    return asdict(probe)


def probe_from_dict(data: Mapping[str, Any]) -> Probe:
    """The probe of plain data.

    Raises:
        TypeError: a key is missing or unknown: another version of this package wrote it.
    """
    return Probe(**data)
