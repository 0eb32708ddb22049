"""All answers of a preflight -> what holds for each node, which nodes to leave out, and the exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_recipes.config.errors import (
    EXIT_CANNOT_WRITE,
    EXIT_CORRUPT_CHECKPOINT,
    EXIT_DATA,
    EXIT_ENVIRONMENT,
    EXIT_INFRASTRUCTURE,
    EXIT_INTERNAL,
    EXIT_MISSING_INPUT,
    EXIT_OK,
    EXIT_RECIPE,
    EXIT_SECRETS,
)
from moe_recipes.launch.preflight.container import environment_difference
from moe_recipes.launch.preflight.plan import Plan
from moe_recipes.launch.preflight.probe import JOB, Probe, Verdict, failed, not_available, passed, probe_from_dict

EXIT_ORDER = (
    EXIT_RECIPE,
    EXIT_DATA,
    EXIT_MISSING_INPUT,
    EXIT_SECRETS,
    EXIT_ENVIRONMENT,
    EXIT_CANNOT_WRITE,
    EXIT_CORRUPT_CHECKPOINT,
    EXIT_INFRASTRUCTURE,
    EXIT_INTERNAL,
)
"""What the user can mend comes first: a job that starts again on other nodes would only meet it once more."""

FACTS: Mapping[str, int] = {
    "recipe": EXIT_RECIPE,
    "image": EXIT_MISSING_INPUT,
    "root file system": EXIT_ENVIRONMENT,
    "driver": EXIT_ENVIRONMENT,
    "lock": EXIT_ENVIRONMENT,
    "packages": EXIT_ENVIRONMENT,
    "code": EXIT_ENVIRONMENT,
    "model revision": EXIT_MISSING_INPUT,
    "DeepEP and NVSHMEM": EXIT_ENVIRONMENT,
}
"""What must be the same on every node, and the exit code where it is wrong on all of them."""

ANSWER = "answer"
"""The probe that a node fails by its silence; where all are silent, it is not theirs."""

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
"""Powers of ten, for numbers that would not fit into the table."""

ORDER: Sequence[Verdict] = ("fail", "not_available", "pass")
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of one preflight."""

    nodes: tuple[str, ...]
    probes: tuple[Probe, ...]
    seconds: float

    def failures(self, node: str) -> list[Probe]:
        return [probe for probe in self.probes if probe.node == node and probe.verdict == "fail"]

    @property
    def excluded(self) -> tuple[str, ...]:
        """Nodes that failed something which is a node's own fault: infrastructure, or what other nodes passed."""
        return tuple(n for n in self.nodes if any(self._is_the_nodes(probe) for probe in self.failures(n)))

    @property
    def exit_code(self) -> int:
        codes = {self.code_of(probe) for probe in self.probes if probe.verdict == "fail"}
        # A probe hands on the code of any error; one that stands in no order is still a failure.
        return next((code for code in EXIT_ORDER if code in codes), max(codes, default=EXIT_OK))

    def code_of(self, probe: Probe) -> int:
        """The exit code of a failed probe alone."""
        return EXIT_INFRASTRUCTURE if probe.node != JOB and self._is_the_nodes(probe) else probe.exit_code

    def _is_the_nodes(self, probe: Probe) -> bool:
        if probe.exit_code == EXIT_INFRASTRUCTURE and probe.name != ANSWER:
            return True
        same = {other.node for other in self.probes if other.name == probe.name and other.verdict == "fail"}
        return not same >= {*self.nodes}

    def to_dict(self) -> dict[str, Any]:
        """For preflight.json and ``--json``."""
        return {
            "schema_version": 1,
            "verdict": "pass" if self.exit_code == EXIT_OK else "fail",
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 1),
            "nodes": {node: "fail" if self.failures(node) else "pass" for node in self.nodes},
            "exclude": list(self.excluded),
            "probes": [vars(probe) for probe in self.probes],
        }


def make_report(
    plan: Plan,
    *,
    expected_recipe: str,
    job_probes: Sequence[Probe],
    outside: Sequence[Record],
    inside: Sequence[Record],
    torch: Sequence[Record],
    wants_outside: bool,
    seconds: float,
) -> Report:
    """Merge the answers.

    Args:
        expected_recipe: ``recipe_hash`` as the batch host has it in memory.
        job_probes: the batch host's own, with node ``job``.
        outside, inside, torch: the records that are there; a node without one did not answer.
        wants_outside: whether nodes were asked outside a container too.
    """
    probes = [*job_probes, *_answers(plan, outside, inside, torch, wants_outside)]
    records = [*outside, *inside, *torch]
    probes += [probe_from_dict(probe) for record in records for probe in record["probes"]]
    facts: dict[str, dict[str, str | None]] = {node: {} for node in plan.nodes}
    for record in records:
        facts.setdefault(record["node"], {}).update(record["facts"])
    for name, exit_code in FACTS.items():
        values = {node: facts[node].get(name) for node in plan.nodes if facts[node]}
        probes += agreement(name, values, exit_code, expected=expected_recipe if name == "recipe" else None)
    if wants_outside:
        there = {record["node"]: record["environment"] for record in outside}
        for record in inside:
            if record["node"] in there:
                found = environment_difference(there[record["node"]], record["environment"])
                probes.append(replace(found, name="environment outside", node=record["node"]))
    return Report(nodes=plan.nodes, probes=tuple(_blamed(plan, _merged(probes))), seconds=seconds)


def _answers(
    plan: Plan, outside: Sequence[Record], inside: Sequence[Record], torch: Sequence[Record], wants_outside: bool
) -> list[Probe]:
    """One probe a node: did it answer at all?"""
    probes = []
    ranks = {record["rank"] for record in torch}
    for index, node in enumerate(plan.nodes):
        silent = []
        if wants_outside and node not in {record["node"] for record in outside}:
            silent.append("outside the container")
        if node not in {record["node"] for record in inside}:
            silent.append("inside the container")
        first = index * plan.tasks_per_node
        missing = [rank for rank in range(first, first + plan.tasks_per_node) if rank not in ranks]
        if missing and torch:
            silent.append(f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}")
        said = f"no answer: {'; '.join(silent)}; look into the logs of this attempt and at the node"
        probes.append(replace(failed(said) if silent else passed(), name=ANSWER, node=node))
    return probes


def _blamed(plan: Plan, probes: Sequence[Probe]) -> list[Probe]:
    """The same probes, but whoever waited for a node that failed by itself is not blamed for it: its peer's file could
    not be there, and collectives could not end."""
    silent = {probe.node for probe in probes if probe.name == ANSWER and probe.verdict == "fail"}
    wrote_none = silent | {
        probe.node for probe in probes if probe.name == "checkpoint write" and probe.verdict == "fail"
    }
    freed = []
    for probe in probes:
        if probe.name == "checkpoint read back" and probe.verdict == "fail":
            peer = plan.peer_of(probe.node)
            if peer in wrote_none:
                found = not_available(f"{peer} wrote nothing that could be read back")
                probe = replace(found, name=probe.name, node=probe.node)
        freed.append(probe)
    return freed


def agreement(
    name: str, values: Mapping[str, str | None], exit_code: int, *, expected: str | None = None
) -> list[Probe]:
    """One probe a node: is its value the one that most nodes have, or the expected one?"""
    known = Counter(value for value in values.values() if value is not None)
    if not known:
        return [replace(not_available("no node can tell"), name=name, node=node) for node in values]
    ranking = known.most_common()
    tied = len(ranking) > 1 and ranking[0][1] == ranking[1][1]
    right = expected or (None if tied else ranking[0][0])
    probes = []
    for node, value in values.items():
        if value is not None and value == right:
            probe = passed(value)
        elif right is None:
            groups = "; ".join(f"{_short(v)} on {', '.join(n for n in values if values[n] == v)}" for v, _ in ranking)
            probe = failed(f"nodes differ, and no value is the most common: {groups}", value=value, exit_code=exit_code)
        else:
            whose = "the batch host has" if expected else f"{known[right]} of {len(values)} nodes have"
            said = f"{_short(value)}, but {whose} {_short(right)}"
            probe = failed(said, value=value, floor=right, exit_code=exit_code)
        probes.append(replace(probe, name=name, node=node))
    return probes


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 48 else f"{value[:45]}..."


def _merged(probes: Sequence[Probe]) -> list[Probe]:
    """One probe a name and node: the worst verdict, and of equal ones the first answer with the least number."""
    best: dict[tuple[str, str], Probe] = {}
    for probe in probes:
        key = (probe.name, probe.node)
        if key not in best or _rank(probe) < _rank(best[key]):
            best[key] = probe
    return list(best.values())


def _rank(probe: Probe) -> tuple[int, float]:
    number = probe.value if isinstance(probe.value, int | float) and not isinstance(probe.value, bool) else 0.0
    return ORDER.index(probe.verdict), float(number)


def table(report: Report) -> str:
    """The report for a terminal: a line a probe, a line a node, the failures, the nodes to leave out."""
    lines = [f"{'probe':28}{'pass':>5}{'fail':>5}{'n/a':>5}  {'value':30}floor"]
    for name in dict.fromkeys(probe.name for probe in report.probes):
        same = [probe for probe in report.probes if probe.name == name]
        counts = Counter(probe.verdict for probe in same)
        cells = "".join(f"{counts[verdict] or '-':>5}" for verdict in ("pass", "fail", "not_available"))
        floor = next((_cell(probe.floor) for probe in same if probe.floor is not None), "")
        lines.append(f"{name:28}{cells}  {_range(same):30}{floor}".rstrip())
    unknown = {p.name: p.message for p in report.probes if p.verdict == "not_available"}
    if unknown:
        lines += ["", "not available:", *(f"  {name}: {message}" for name, message in unknown.items())]
    lines.append("")
    for node in (JOB, *report.nodes):
        bad = report.failures(node)
        lines.append(f"{node:20} {'FAIL' if bad else 'PASS'}")
        lines += [f"  {probe.name}: {probe.message}" for probe in bad]
    if report.excluded:
        lines += ["", f"--exclude={','.join(report.excluded)}"]
    verdict = "PASS" if report.exit_code == EXIT_OK else "FAIL"
    lines += ["", f"preflight {verdict}: {len(report.nodes)} nodes in {report.seconds:.0f} s, exit {report.exit_code}"]
    return "\n".join(lines) + "\n"


def _range(probes: Sequence[Probe]) -> str:
    values = [probe.value for probe in probes if probe.value is not None]
    numbers = [value for value in values if isinstance(value, int | float)]
    if numbers and len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        return _cell(low) if low == high else f"{_cell(low)} to {_cell(high)}"
    different = {_cell(value) for value in values}
    return different.pop() if len(different) == 1 else f"{len(different)} different" if different else ""


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return ""
    if isinstance(value, str):
        return value if len(value) <= 28 else f"{value[:26]}.."
    unit = next(((scale, mark) for scale, mark in UNITS if abs(value) >= scale), None)
    if unit is not None:
        return f"{value / unit[0]:.2f} {unit[1]}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
