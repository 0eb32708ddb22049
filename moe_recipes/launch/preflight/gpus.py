"""What nvidia-smi says about the GPUs of a node."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from moe_recipes.config.errors import InfrastructureError
from moe_recipes.launch.preflight.probe import Probe, failed, not_available, passed, run_tool

FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks.max.sm",
    "clocks.applications.graphics",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "temperature.gpu",
)
"""Names of ``nvidia-smi --query-gpu``; MiB, MHz, degrees Celsius."""

UNKNOWN = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[GPU requires reset]", "")
Gpu = dict[str, str]


def read_gpus(tool: str = "nvidia-smi") -> list[Gpu] | None:
    """One record a GPU by the names of ``FIELDS``; None without the tool.

    Raises:
        InfrastructureError: the tool failed, which is what it does when a GPU fell off the bus.
    """
    done = run_tool([tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"])
    if done is None:
        return None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise InfrastructureError(f"nvidia-smi ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """The records of ``--format=csv,noheader,nounits``.

    Raises:
        InfrastructureError: a line has another number of fields than were asked for.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    for row in rows:
        if len(row) != len(FIELDS):
            raise InfrastructureError(f"nvidia-smi answered {', '.join(row)!r} where {len(FIELDS)} fields were asked")
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


def driver_of(gpus: Sequence[Gpu] | None) -> str | None:
    """The driver's version, for comparing nodes."""
    return ",".join(sorted({gpu["driver_version"] for gpu in gpus})) if gpus else None


def gpu_count(gpus: Sequence[Gpu] | None, expected: int) -> Probe:
    """As many GPUs as the job was promised, all of one kind."""
    if gpus is None:
        return not_available("no nvidia-smi on this node")
    if len(gpus) < expected:
        return failed("GPUs are missing; look for XID errors in the kernel's log", value=len(gpus), floor=expected)
    names = sorted({gpu["name"] for gpu in gpus})
    if len(names) > 1:
        return failed(f"GPUs of several kinds: {', '.join(names)}", value=len(gpus), floor=expected)
    return passed(len(gpus), floor=expected, message=names[0] if names else "")


def gpu_ecc(gpus: Sequence[Gpu] | None) -> Probe:
    """ECC on, no uncorrected error since the driver loaded, no row waiting to be remapped and no remap that failed."""
    if not gpus:
        return not_available("no nvidia-smi on this node" if gpus is None else "no GPU")
    keys = ("ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")
    if all(gpu[key] in UNKNOWN for gpu in gpus for key in keys):
        return not_available("these GPUs report neither ECC errors nor remapped rows")
    bad = [f"GPU {gpu['index']}: {key}={gpu[key]}" for gpu in gpus for key in keys if not _is_zero(gpu[key])]
    bad += [f"GPU {gpu['index']}: ECC is off" for gpu in gpus if gpu["ecc.mode.current"] == "Disabled"]
    return failed(f"{'; '.join(bad)}; reset the GPU or drain the node", value=len(bad), floor=0) if bad else passed(0)


def gpu_clocks(gpus: Sequence[Gpu] | None) -> Probe:
    """No hardware slowdown, and the same highest clock on all GPUs. The value is that clock in MHz."""
    if not gpus:
        return not_available("no nvidia-smi on this node" if gpus is None else "no GPU")
    slow = [
        f"GPU {gpu['index']}: {key.rpartition('.')[2]} at {gpu['temperature.gpu']} C"
        for gpu in gpus
        for key in ("clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.hw_thermal_slowdown")
        if gpu[key] == "Active"
    ]
    if slow:
        return failed(f"{'; '.join(slow)}; look at cooling and power of the node")
    clocks = sorted({gpu["clocks.max.sm"] for gpu in gpus})
    if all(clock in UNKNOWN for clock in clocks):
        return not_available("these GPUs do not report their clocks")
    if len(clocks) > 1:
        return failed(f"GPUs have different highest clocks: {', '.join(clocks)} MHz", value=clocks)
    return passed(int(clocks[0]))


def gpu_memory(gpus: Sequence[Gpu] | None, most_used_mib: int) -> Probe:
    """No memory that another process holds; the value is the fullest GPU's used MiB, the floor the most that passes."""
    if not gpus:
        return not_available("no nvidia-smi on this node" if gpus is None else "no GPU")
    used: dict[str, Any] = {g["index"]: int(g["memory.used"]) for g in gpus if g["memory.used"].isdigit()}
    if not used:
        return not_available("these GPUs do not report used memory")
    full = [f"GPU {index}: {mib} MiB" for index, mib in used.items() if mib > most_used_mib]
    value = max(used.values())
    if full:
        mend = "a process of an earlier job holds it; look with `nvidia-smi`, or drain the node"
        return failed(f"memory in use before the job: {'; '.join(full)}; {mend}", value=value, floor=most_used_mib)
    return passed(value, floor=most_used_mib)


def _is_zero(text: str) -> bool:
    return text in UNKNOWN or text in ("0", "No")
