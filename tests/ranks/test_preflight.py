"""The torch probes on gloo ranks: right numbers pass, wrong ones name their source, a dead rank hangs nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moe_recipes.launch.local import free_port
from moe_recipes.launch.preflight.plan import read_records, write_plan
from moe_recipes.runtime.preflight import all_reduce, all_to_all, deep_ep, gemm, neighbour
from moe_recipes.runtime.world import World
from tests.ranks.launch import run_on_ranks
from tests.unit.preflight_cases import make_plan

SIZE = 1 << 16
NODES = ("node0", "node1")
RUN = (
    "import sys; from pathlib import Path; from moe_recipes.runtime.preflight import run;"
    "from moe_recipes.launch.preflight.plan import read_plan; folder = Path(sys.argv[1]);"
    "run(read_plan(folder), folder, cpu=True, limit_s={limit}, join_limit_s={join})"
)


def this_world() -> World:
    rank = dist.get_rank()
    return World(rank=rank, local_rank=rank, size=dist.get_world_size(), device=torch.device("cpu"), host="here")


def check_collectives() -> None:
    world = this_world()
    plan = make_plan(Path("/"), nodes=NODES, tasks_per_node=2)
    for probe in (all_reduce(world, None, SIZE), all_to_all(world, 1e-6, SIZE), neighbour(world, plan, SIZE)):
        assert probe.verdict == "pass", probe
        assert probe.value > 0
    for slow in (all_reduce(world, 1e6, SIZE), all_to_all(world, 1e6, SIZE)):
        assert (slow.verdict, slow.floor) == ("fail", 1e6)


def check_a_rank_that_sends_wrong_numbers() -> None:
    """Rank 3 takes itself for rank 1, so it adds and sends what is not its own."""
    world = this_world()
    wrong = replace(world, rank=1) if world.rank == 3 else world
    assert all_reduce(wrong, None, SIZE).verdict == "fail"
    found = all_to_all(wrong, None, SIZE)
    assert found.verdict == "fail"
    if world.rank != 3:
        assert found.message.endswith("received wrong numbers: parts from ranks 3")


def check_deep_ep(folders: list[str], verdict: str, words: str) -> None:
    """A folder a rank in front of the path; one without deep_ep is a rank without the library."""
    sys.path.insert(0, folders[dist.get_rank()])
    found = deep_ep(this_world())
    assert (found.verdict, words in found.message) == (verdict, True), found


def test_collectives() -> None:
    run_on_ranks(check_collectives, 4)


def test_wrong_numbers_name_their_source() -> None:
    run_on_ranks(check_a_rank_that_sends_wrong_numbers, 4)


def test_deep_ep_is_there_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    good, bad, none = (tmp_path / name for name in ("good", "bad", "none"))
    for folder, text in (
        (good, "__version__ = '1.2.1'\n"),
        (bad, "raise ImportError('libnvshmem_host.so.3: not found')\n"),
    ):
        (folder / "deep_ep").mkdir(parents=True)
        (folder / "deep_ep" / "__init__.py").write_text(text)
    run_on_ranks(check_deep_ep, 2, [str(none)] * 2, "not_available", "DeepEP is not installed")
    run_on_ranks(check_deep_ep, 2, [str(good)] * 2, "not_available", "a handshake needs several ranks with GPUs")
    run_on_ranks(check_deep_ep, 2, [str(bad)] * 2, "fail", "libnvshmem_host.so.3: not found")
    run_on_ranks(check_deep_ep, 2, [str(good), str(none)], "fail", "only some ranks have DeepEP")


def test_gemm_knows_its_answer() -> None:
    found = gemm(torch.device("cpu"))
    assert (found.verdict, found.message) == ("not_available", "no GPU; the known answer is right on the CPU")


def start_rank(folder: Path, rank: int, port: int, *, limit: float, join: float) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
    environment["SLURMD_NODENAME"] = NODES[rank // 2]
    return subprocess.Popen([sys.executable, "-c", RUN.format(limit=limit, join=join), str(folder)], env=environment)


def test_four_processes_write_what_they_found(tmp_path: Path) -> None:
    write_plan(tmp_path, make_plan(tmp_path, nodes=NODES, tasks_per_node=2))
    port = free_port()
    ranks = [start_rank(tmp_path, rank, port, limit=120, join=60) for rank in range(4)]
    assert [process.wait(150) for process in ranks] == [0] * 4
    records = read_records(tmp_path, "torch")
    assert [(record["rank"], record["node"]) for record in records] == [(rank, NODES[rank // 2]) for rank in range(4)]
    for record in records:
        found = {probe["name"]: (probe["verdict"], probe["node"]) for probe in record["probes"]}
        assert found["join"] == found["all-reduce"] == found["all-to-all"] == ("pass", "job")
        assert found["neighbour link"] == ("pass", record["node"])
        assert f"torch {torch.__version__}" in record["facts"]["DeepEP and NVSHMEM"]


def test_a_rank_that_never_comes_hangs_nobody(tmp_path: Path) -> None:
    """One of four is missing: the meeting times out, the three leave records that say so, and end with 0."""
    write_plan(tmp_path, make_plan(tmp_path, nodes=NODES, tasks_per_node=2))
    port = free_port()
    ranks = [start_rank(tmp_path, rank, port, limit=40, join=3) for rank in range(3)]
    assert [process.wait(100) for process in ranks] == [0] * 3
    records = read_records(tmp_path, "torch")
    assert [record["rank"] for record in records] == [0, 1, 2]
    for record in records:
        last = record["probes"][-1]
        assert (last["name"], last["node"], last["verdict"]) == ("join", "job", "fail"), json.dumps(record)


def test_the_watchdog_ends_a_rank_that_waits_too_long(tmp_path: Path) -> None:
    """One of four is missing and the meeting has no time-out of its own: the records are there all the same."""
    write_plan(tmp_path, make_plan(tmp_path, nodes=NODES, tasks_per_node=2))
    port = free_port()
    ranks = [start_rank(tmp_path, rank, port, limit=4, join=600) for rank in range(3)]
    assert [process.wait(100) for process in ranks] == [0] * 3
    last = [record["probes"][-1] for record in read_records(tmp_path, "torch")]
    assert [(probe["name"], probe["verdict"]) for probe in last] == [("join", "fail")] * 3
    # The first one to leave takes the meeting point with it, so others may see that instead of their own watchdog.
    assert any("was still in it after 4 s" in probe["message"] for probe in last), last
