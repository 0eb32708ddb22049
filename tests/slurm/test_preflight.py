"""Preflight on a real Slurm: good nodes pass, a bad one is named, and what is wrong everywhere is nobody's node."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.images import mount_of_packages
from tests.slurm.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).resolve().parents[2]
MOE_RECIPES = (sys.executable, "-m", "moe_recipes.launch.cli")
CANARY = "hf_canaryCanaryCanary0123456789"


@pytest.fixture
def site(slurm_folder: Path, image: Path, tmp_path: Path) -> Path:
    """A cluster file for the lab, with tokens and a container whose packages are those of the tests' Python."""
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={CANARY}\n")
    secrets.chmod(0o600)
    cluster = {
        "name": "lab",
        "slurm": {"partition": "main", "gpus_per_node": 1, "exclusive": False, "time": "01:00:00"},
        "container": {"runtime": "pyxis", "image": str(image), "mounts": [mount_of_packages()]},
        "paths": {"runs": str(tmp_path / "runs"), "secrets": str(secrets)},
        "env": {"GLOO_SOCKET_IFNAME": "lo", "SET_BY_IMAGE": "the job"},
    }
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def recipe_words(num_ranks: int) -> list[str]:
    layout = [f"parallel.fsdp_size={num_ranks}", "parallel.ep_size=1", "data.format=random_tokens", "data.train=[]"]
    layout += [
        "data.validation_fraction=0.0",
        "train.validate_every_steps=0",
        "optim.warmup_steps=0",
        "model.tokenizer=null",
        "run_dir=null",
    ]
    return ["tiny_cpu", *(word for text in layout for word in ("--set", text))]


def preflight(lab: Lab, site: Path, *, nodes: int, code: int) -> dict[str, Any]:
    """Run the verb inside an allocation of so many nodes; its JSON."""
    words = ["preflight", *recipe_words(nodes), "--cluster", str(site), "--json"]
    output = site.parent / "preflight.out"
    script = " ".join(shlex.quote(str(word)) for word in (*MOE_RECIPES, *words))
    flags = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=1", f"--chdir={ROOT}", f"--output={output}"]
    job = lab.sbatch(*flags, "--wrap", script)
    record = lab.wait_for_end(job, 120)
    said = output.read_text()
    assert record.exit_code == f"{code}:0", said
    return json.loads(said.splitlines()[-1])


def verdicts(answer: dict[str, Any], name: str) -> dict[str, str]:
    return {probe["node"]: probe["verdict"] for probe in answer["probes"] if probe["name"] == name}


@contextmanager
def read_only_on(lab: Lab, node: str, folder: Path) -> Iterator[None]:
    """On one node alone, a folder is mounted for reading only: a step runs in its node's space of mounts."""
    place = shlex.quote(str(folder))
    mount = f"mount --bind {place} {place} && mount -o remount,bind,ro {place}"
    lab.run("srun", f"--nodelist={node}", "sh", "-c", mount)
    try:
        yield
    finally:
        lab.run("srun", f"--nodelist={node}", "umount", folder)


def test_good_nodes_pass_and_nothing_secret_is_written(lab: Lab, site: Path) -> None:
    answer = preflight(lab, site, nodes=2, code=0)
    assert answer["verdict"] == "pass"
    assert answer["exclude"] == []
    assert len(answer["nodes"]) == 2
    assert {*answer["nodes"].values()} == {"pass"}
    for name in (
        "checkpoint write",
        "checkpoint read back",
        "environment",
        "clock",
        "code",
        "packages",
        "secrets file",
    ):
        assert {*verdicts(answer, name).values()} == {"pass"}, name
    for name in ("all-reduce", "all-to-all", "container flags", "image file", "step inside", "step outside"):
        assert verdicts(answer, name) == {"job": "pass"}, name
    # The lab's GPUs are not real, and the recipe reads no data: nobody may call that a pass.
    for name in ("GPU count", "GPU ECC", "driver", "data sample", "offline hub"):
        assert {*verdicts(answer, name).values()} == {"not_available"}, name
    run = site.parent / "runs" / "tiny_cpu"
    assert json.loads((run / "preflight.json").read_text())["verdict"] == "pass"
    assert not list(run.glob(".preflight-*"))
    assert not [path for path in run.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_a_bad_node_is_named_and_its_neighbour_is_not_blamed(lab: Lab, site: Path) -> None:
    ckpt = site.parent / "runs" / "tiny_cpu" / "ckpt"
    ckpt.mkdir(parents=True)
    with read_only_on(lab, "node3", ckpt):
        answer = preflight(lab, site, nodes=4, code=69)
    assert answer["exclude"] == ["node3"]
    assert answer["nodes"] == {"node1": "pass", "node2": "pass", "node3": "fail", "node4": "pass"}
    bad = [probe for probe in answer["probes"] if probe["verdict"] == "fail"]
    assert [(probe["name"], probe["node"]) for probe in bad] == [("checkpoint write", "node3")]
    assert "Read-only file system" in bad[0]["message"]
    assert verdicts(answer, "checkpoint read back")["node2"] == "not_available", "it waited for node3's file"


def test_what_is_wrong_everywhere_excludes_no_node(lab: Lab, site: Path) -> None:
    cluster = yaml.safe_load(site.read_text())
    cluster["container"]["mounts"].append("/no/such/folder:/data:ro")
    site.write_text(yaml.safe_dump(cluster))
    answer = preflight(lab, site, nodes=2, code=78)
    assert answer["exclude"] == []
    assert {*answer["nodes"].values()} == {"fail"}
    messages = {probe["name"]: probe["message"] for probe in answer["probes"] if probe["verdict"] == "fail"}
    assert "/no/such/folder" in messages["step inside"]


def test_readable_secrets_are_told_before_any_rank_trains(lab: Lab, site: Path) -> None:
    (site.parent / "secrets").chmod(0o644)
    answer = preflight(lab, site, nodes=1, code=77)
    messages = {probe["name"]: probe["message"] for probe in answer["probes"] if probe["verdict"] == "fail"}
    assert "chmod 600" in messages["secrets file on the host"]
    assert CANARY not in json.dumps(answer)


def test_a_job_of_its_own_and_the_first_step_of_a_run_ask_the_same(lab: Lab, site: Path) -> None:
    """Through the supervisor: a preflight job ends with the contract's code; a run whose node fails does not train."""
    run = site.parent / "runs" / "tiny_cpu"
    (run / "ckpt").mkdir(parents=True)
    words = [*recipe_words(2), "--cluster", str(site), "--nodes", "2", "--json"]
    with read_only_on(lab, "node1", run / "ckpt"):
        asked = json.loads(lab.run(*MOE_RECIPES, "preflight", *words, "--set", "checkpoint.keep_last=3").stdout)
        assert lab.wait_for_end(asked["job"], 120).exit_code == "69:0"
        said = Path(asked["log"]).read_text()
        assert "--exclude=node1" in said
        assert json.loads(Path(asked["result"]).read_text())["exclude"] == ["node1"]
        assert not (site.parent / "runs" / "excluded_nodes.json").exists(), "it only asks"

        cluster = yaml.safe_load(site.read_text())
        site.write_text(yaml.safe_dump({**cluster, "limits": {"preflight": True}}))
        trained = json.loads(lab.run(*MOE_RECIPES, "launch", *words, "--set", "train.steps=1").stdout)
        job = trained["job"]
        bad = site.parent / "runs" / "excluded_nodes.json"
        lab.wait_for(bad.exists, 120, job)
        assert "preflight on node1: checkpoint write" in bad.read_text()
        lab.wait_for(lambda: lab.job_records(job)[-1].restarts == 1, 60, job)
    assert not (run / "metrics.jsonl").exists(), "no step was trained on the bad node"
    lab.run("scancel", job)
