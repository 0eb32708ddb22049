"""The one test of a real Slurm in the fast tier: a cluster comes up, a job runs through the script, all is gone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.lab import running_lab
from tests.slurm.site import Site
from tests.slurm.test_lab import processes_of

pytestmark = pytest.mark.slurm


def test_a_probe_of_two_tasks_runs_through_sbatch(slurm_folder: Path) -> None:
    with running_lab(2) as lab:
        site = Site(lab, Path("/no/image"), slurm_folder / "smoke")
        site.plain["container"] = {"runtime": "none", "python": sys.executable}
        site.write_cluster()
        options = ("--nodes=2", "--ntasks-per-node=1")
        layout = ("parallel.fsdp_size=2", "parallel.ep_size=2")
        job = site.script("tiny", *layout, options=options, MOE_WORK="probe")
        record = lab.wait_for_end(job)
        assert (record.state, record.exit_code) == ("COMPLETED", "0:0"), lab.output_of(job)
        probes = sorted(site.run("tiny_slurm").path.glob("attempts/1/probe-*.json"))
        facts = [json.loads(probe.read_text()) for probe in probes]
        assert [(fact["rank"], fact["world_size"], fact["host"]) for fact in facts] == [
            (0, 2, "node1"),
            (1, 2, "node2"),
        ]
        assert [fact["mesh"]["ep_rank"] for fact in facts] == [0, 1]
        assert len({fact["master"] for fact in facts}) == 1
        folder = str(lab.folder)
    assert processes_of(folder) == []
