"""The unmodified script of the largest recipe on as many nodes: all 128 tasks start, and its shakedown passes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.lab import Lab
from tests.slurm.site import JOB_S, Site

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_ultra_on_16_nodes_of_8_gpus(lab16: Lab, image: Path, slurm_folder: Path) -> None:
    site = Site(lab16, image, slurm_folder / "ultra")
    job = site.script("ultra_550b", MOE_WORK="probe")
    lab16.wait_for_state(job, "COMPLETED", JOB_S)
    (attempt,) = (path.parent for path in site.runs.glob("*/attempts/1/job.json"))
    facts = [json.loads(path.read_text()) for path in sorted(attempt.glob("probe-*.json"))]
    assert [fact["rank"] for fact in facts] == list(range(128))
    assert {fact["world_size"] for fact in facts} == {128}
    # Block by block: eight ranks a node, and each sees its node's eight GPUs and takes its own.
    assert Counter(fact["host"] for fact in facts) == {node: 8 for node in lab16.nodes}
    assert all(len({fact["host"] for fact in facts[first : first + 8]}) == 1 for first in range(0, 128, 8))
    assert [fact["local_rank"] for fact in facts] == list(range(8)) * 16
    assert {fact["visible_gpus"] for fact in facts} == {"0,1,2,3,4,5,6,7"}
    # Two groups of 64 ranks hold all experts each.
    assert [fact["mesh"]["ep_rank"] for fact in facts] == list(range(64)) * 2
    assert [fact["mesh"]["efsdp_rank"] for fact in facts] == [0] * 64 + [1] * 64
    assert {fact["master"].split(":")[0] for fact in facts} == {facts[0]["host"]}
    assert not any(fact["container"]["root_is_writable"] for fact in facts)

    job = site.script("ultra_550b", options=("--ntasks-per-node=1",), MOE_SHAKEDOWN="narrow")
    lab16.wait_for_state(job, "COMPLETED", 2 * JOB_S)
    (verdict,) = site.runs.glob("*-shakedown/shakedown.json")
    found = json.loads(verdict.read_text())
    assert found["verdict"] == "PASS"
    assert {check["name"] for check in found["checks"] if check["passed"]} >= {
        "trained",
        "saved",
        "resumed",
        "exported",
    }
    assert len(lab16.job_records(job)) == 2
    ends = [json.loads(path.read_text()) for path in verdict.parent.glob("attempts/2/rank-*.exit.json")]
    assert {end["host"] for end in ends} == set(lab16.nodes)
