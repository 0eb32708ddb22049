"""Many nodes' answers -> a verdict a node, the nodes to leave out, the exit code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError
from moe_recipes.launch.preflight import step
from moe_recipes.launch.preflight.clock import clock_server
from moe_recipes.launch.preflight.node import ask, code_hash
from moe_recipes.launch.preflight.plan import is_secret, read_plan, read_records, recipe_hash, write_plan
from moe_recipes.launch.preflight.probe import JOB, Probe, failed, not_available, passed
from moe_recipes.launch.preflight.report import Report, agreement, make_report, table
from tests.unit.preflight_cases import make_plan, make_recipe, record

NODES = ("node1", "node2", "node3", "node4")
RECIPE = "0123456789abcdef"


def named(probe: Probe, name: str, node: str = "") -> Probe:
    return dataclasses.replace(probe, name=name, node=node)


def merged(inside: Sequence[dict[str, Any]], *job: Probe, torch: Sequence[dict[str, Any]] = ()) -> Report:
    return make_report(
        make_plan(Path("/runs"), nodes=NODES),
        expected_recipe=RECIPE,
        job_probes=[dataclasses.replace(probe, node=JOB) for probe in job],
        outside=[],
        inside=inside,
        torch=torch,
        wants_outside=False,
        seconds=12.3,
    )


def answers(**bad: Probe) -> list[dict[str, Any]]:
    """All nodes agree and pass ``x``, except for those named."""
    return [
        record(node, named(bad.get(node, passed(1.5, floor=1.0)), "x"), rank=rank, recipe=RECIPE, driver="580")
        for rank, node in enumerate(NODES)
    ]


def verdict_of(report: Report, name: str, node: str) -> str:
    return next(probe.verdict for probe in report.probes if (probe.name, probe.node) == (name, node))


def test_all_is_well() -> None:
    report = merged(answers())
    assert (report.exit_code, report.excluded) == (0, ())
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["nodes"] == dict.fromkeys(NODES, "pass")
    assert (plain["verdict"], plain["exclude"]) == ("pass", [])


def test_one_bad_node_is_infrastructure_whatever_the_probe() -> None:
    """A model file that one node of four cannot read is that node's fault."""
    report = merged(answers(node3=failed("model.safetensors: cut short", exit_code=74)))
    assert (report.exit_code, report.excluded) == (69, ("node3",))
    assert [node for node in NODES if report.failures(node)] == ["node3"]


def test_what_all_nodes_fail_is_the_inputs_fault() -> None:
    report = merged(answers(**dict.fromkeys(NODES, failed("model.safetensors: not there", exit_code=66))))
    assert (report.exit_code, report.excluded) == (66, ())
    broken = merged(answers(**dict.fromkeys(NODES, failed("GPU 0: ECC"))))
    assert (broken.exit_code, broken.excluded) == (69, NODES), "hardware is each node's own"


def test_what_a_user_can_mend_comes_before_what_a_restart_can() -> None:
    report = merged(answers(node2=failed("GPU 0")), named(failed("chmod 600", exit_code=77), "secrets file"))
    assert (report.exit_code, report.excluded) == (77, ("node2",))


def test_a_silent_node_is_named_and_the_others_wait_for_nobody() -> None:
    report = merged(answers()[:3])
    assert (report.exit_code, report.excluded) == (69, ("node4",))
    assert "no answer: inside the container" in report.failures("node4")[0].message
    all_silent = merged([], named(failed("no such image", exit_code=78), "step inside"))
    assert (all_silent.exit_code, all_silent.excluded) == (78, ()), "an image that is not there is nobody's node"


def test_a_rank_without_a_record_is_named() -> None:
    torch = [record(node, rank=rank) for rank, node in enumerate(NODES) if node != "node2"]
    join = named(failed("timed out"), "join", JOB)
    torch[0]["probes"] = [dataclasses.asdict(join)]
    report = merged(answers(), torch=torch)
    assert (report.exit_code, report.excluded) == (69, ("node2",))
    assert "rank 1" in report.failures("node2")[0].message


def test_the_reader_of_a_missing_file_is_not_blamed() -> None:
    inside = answers()
    write, read = failed("Read-only file system", exit_code=73), failed("not seen")
    inside[2]["probes"].append(dataclasses.asdict(named(write, "checkpoint write", "node3")))
    inside[1]["probes"].append(dataclasses.asdict(named(read, "checkpoint read back", "node2")))
    report = merged(inside)
    assert (report.exit_code, report.excluded) == (69, ("node3",))
    assert verdict_of(report, "checkpoint read back", "node2") == "not_available"
    alone = answers()
    alone[1]["probes"].append(dataclasses.asdict(named(read, "checkpoint read back", "node2")))
    assert merged(alone).excluded == ("node2",), "node3 did write"


def test_a_node_with_another_recipe_or_driver() -> None:
    inside = answers()
    inside[1]["facts"]["driver"] = "570"
    inside[3]["facts"]["recipe"] = "f" * 16
    report = merged(inside)
    assert (report.exit_code, report.excluded) == (69, ("node2", "node4"))
    assert report.failures("node2")[0].message == "570, but 3 of 4 nodes have 580"
    stale = answers()
    for one in stale:
        one["facts"]["recipe"] = "f" * 16
    assert (merged(stale).exit_code, merged(stale).excluded) == (64, ())


def test_agreement() -> None:
    assert {probe.verdict for probe in agreement("driver", dict.fromkeys(NODES), 78)} == {"not_available"}
    tied = agreement("code", {"node1": "a", "node2": "b"}, 78)
    assert [probe.verdict for probe in tied] == ["fail", "fail"]
    assert tied[0].message == "nodes differ, and no value is the most common: a on node1; b on node2"
    lacking = agreement("driver", {"node1": "580", "node2": "580", "node3": None}, 78)
    assert [probe.verdict for probe in lacking] == ["pass", "pass", "fail"]


def test_eight_ranks_of_a_node_are_one_line_with_the_worst_of_them() -> None:
    torch = [
        record("node1", named(probe, "GEMM"), rank=rank)
        for rank, probe in enumerate([passed(700.0), passed(650.0), not_available("no GPU"), failed("wrong")])
    ]
    report = merged(answers(), torch=torch)
    (found,) = [probe for probe in report.probes if probe.name == "GEMM"]
    assert (found.verdict, found.message) == ("fail", "wrong")
    assert verdict_of(merged(answers(), torch=torch[:3]), "GEMM", "node1") == "not_available"
    (slowest,) = [p for p in merged(answers(), torch=torch[:2]).probes if p.name == "GEMM"]
    assert slowest.value == 650.0


def test_the_table() -> None:
    text = table(merged(answers(node3=failed("too slow", value=0.5, floor=1.0), node4=not_available("no GPU"))))
    lines = text.splitlines()
    assert lines[0].split() == ["probe", "pass", "fail", "n/a", "value", "floor"]
    assert "x                               2    1    1  0.5 to 1.5                    1" in lines
    assert "  x: no GPU" in lines
    assert [line.split() for line in lines if line.startswith("node")][2] == ["node3", "FAIL"]
    assert "  x: too slow" in lines
    assert "--exclude=node3" in lines
    assert lines[-1] == "preflight FAIL: 4 nodes in 12 s, exit 69"


def test_large_numbers_fit_the_table() -> None:
    report = merged(answers(**dict.fromkeys(NODES, passed(2_500_000_000_000, floor=68_493_688_832))))
    assert any(line.split() == ["x", "4", "-", "-", "2.50", "T", "68.49", "G"] for line in table(report).splitlines())


def test_plan_survives_its_file_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, nodes=NODES, environment={"A": "1"})
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert [plan.peer_of(node) for node in NODES] == ["node2", "node3", "node4", "node1"]
    (tmp_path / "plan.json").write_text('{"recipe": {}}')
    with pytest.raises(CorruptCheckpointError, match="not a plan of this version"):
        read_plan(tmp_path)
    with pytest.raises(MissingInputError, match="is the run folder mounted here"):
        read_plan(tmp_path / "none")


def test_half_a_record_counts_as_no_answer(tmp_path: Path) -> None:
    (tmp_path / "probe-00000.json").write_text('{"rank": 0}')
    (tmp_path / "probe-00001.json").write_text('{"rank": ')
    assert [one["rank"] for one in read_records(tmp_path, "probe")] == [0]


def test_code_hash_sees_one_changed_byte(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_hash(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_hash(tmp_path) != before
    assert is_secret("WANDB_API_KEY")
    assert not is_secret("NCCL_DEBUG")


def test_a_whole_node_without_a_container(tmp_path: Path) -> None:
    """Every probe of this very machine, as its only node: none fails, and the record is plain data."""
    recipe = make_recipe()
    with clock_server() as port:
        plan = make_plan(tmp_path, recipe=recipe, nodes=("here",), clock_port=port)
        found = json.loads(json.dumps(ask("inside", plan, rank=0, node="here")))
    names = {probe["name"]: probe["verdict"] for probe in found["probes"]}
    assert names["clock"] == names["checkpoint write"] == names["checkpoint read back"] == "pass"
    assert [probe for probe in found["probes"] if probe["verdict"] == "fail"] == []
    assert found["facts"]["recipe"] == recipe_hash(plan.recipe)
    assert "torch" in found["facts"]["packages"]


def test_a_recipe_that_this_nodes_code_does_not_know(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, nodes=("here",))
    plan.recipe["train"]["stepps"] = 3
    found = ask("inside", plan, rank=0, node="here")
    (bad,) = [probe for probe in found["probes"] if probe["verdict"] == "fail" and probe["name"] == "recipe"]
    assert bad["exit_code"] == 64
    assert "unknown key 'train.stepps'" in bad["message"]


def test_the_task_needs_no_torch_outside_the_container(tmp_path: Path) -> None:
    with clock_server() as port:
        write_plan(tmp_path, make_plan(tmp_path, nodes=("here",), runtime="pyxis", clock_port=port))
        task = "import sys; from moe_recipes.launch.preflight import task, verb; c = task.main(sys.argv[1:]);"
        words = [sys.executable, "-c", f"{task} print('torch' in sys.modules); sys.exit(c)", str(tmp_path), "--outside"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    (found,) = read_records(tmp_path, "outside")
    assert {probe["name"] for probe in found["probes"]} == {"GPU count", "GPU ECC", "GPU clocks", "GPU memory", "clock"}
    assert abs(found["time"] - time.time()) < 60


def test_a_failure_is_no_pass_whatever_its_code() -> None:
    bad = named(failed("the model does not fit", exit_code=20), "walltime", JOB)
    assert Report(nodes=("n1",), probes=(bad,), seconds=0.0).exit_code == 20


def test_what_is_missing_is_said_before_what_follows_from_it(tmp_path):
    """Lines of two nodes come in any order, and only the first few are shown."""
    log = tmp_path / "srun-inside.log"
    log.write_text(
        "srun: error: node2: task 1: Exited with exit code 1\n"
        "srun: error: node1: task 0: Exited with exit code 1\n"
        "slurmstepd-node2: error: pyxis: container start failed with error code: 1\n"
        "slurmstepd-node2: error: pyxis: printing enroot log file:\n"
        "slurmstepd-node2: error: pyxis:     [ERROR] No such file or directory: /no/such/folder\n"
    )
    assert step._errors(log).startswith("[ERROR] No such file or directory: /no/such/folder; node2: task 1")
    log.write_text("one line\nthe last line\n")
    assert step._errors(log) == "the last line"
