"""The torch probes of a preflight: ``python -m moe_recipes.runtime.preflight FOLDER``, on every rank.

Each rank writes ``torch-NNNNN.json`` beside the plan and ends with 0, also where a probe failed: the batch host judges.
Nothing waits for ever: a collective that hangs ends with its probe named, so that a dead node cannot hold up the rest.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from moe_recipes.config.errors import EXIT_ENVIRONMENT, EXIT_OK, MoeRecipesError, first_line
from moe_recipes.config.run_folder import write_json
from moe_recipes.launch.preflight.plan import Plan, node_name, read_plan, record_path
from moe_recipes.launch.preflight.probe import JOB, Probe, at_least, failed, not_available, passed, probe_to_dict
from moe_recipes.runtime.world import World, join_world, max_over_ranks, rank_variables

JOIN_LIMIT_S = 60.0
LIMIT_S = 110.0
"""For all torch probes of a rank, the meeting included."""

GPU_BYTES, CPU_BYTES = 256 * 2**20, 4 * 2**20
"""A collective's tensor on one rank."""

WARM_UP, ROUNDS = 2, 5
GEMM_SIZE = 4096
VERSIONS = ("torch", "deep-ep", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")


@dataclass
class _Answers:
    """What this rank found so far, and what it is doing now; the watchdog reads both."""

    path: Path
    rank: int
    node: str
    facts: dict[str, str] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    now: str = "join"
    start: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, name: str, function: Callable[[], Probe], *, node: str) -> bool:
        """Ask one probe and keep its answer; False if it failed. A library's error is its failure."""
        self.now = name
        try:
            probe = function()
        except MoeRecipesError as error:
            probe = failed(str(error), exit_code=error.exit_code)
        except (RuntimeError, ImportError, OSError, ValueError) as error:
            probe = failed(f"rank {self.rank} on {self.node}: {type(error).__name__}: {first_line(error)}")
        self.probes.append(replace(probe, name=name, node=node))
        return probe.verdict != "fail"

    def write_and_end(self) -> NoReturn:
        """Write the record and end the process: peers may be stuck in a collective that no exit handler survives."""
        with self.lock:
            record = {"rank": self.rank, "node": self.node, "facts": self.facts, "environment": {}}
            write_json(self.path, {**record, "probes": [probe_to_dict(probe) for probe in self.probes]})
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_OK)

    def give_up_after(self, limit_s: float) -> None:
        """From a thread: end this rank with what it has when the time is over."""

        def watch() -> None:
            time.sleep(limit_s)
            late = failed(
                f"rank {self.rank} on {self.node} was still in it after {limit_s:g} s; a peer or a link hangs"
            )
            self.probes.append(replace(late, name=self.now, node=JOB))
            self.write_and_end()

        threading.Thread(target=watch, name="preflight watchdog", daemon=True).start()


def run(
    plan: Plan, folder: Path, *, cpu: bool = False, limit_s: float = LIMIT_S, join_limit_s: float = JOIN_LIMIT_S
) -> None:
    """All probes of this rank; does not return."""
    rank, local_rank, _ = rank_variables(dict(os.environ))
    answers = _Answers(path=record_path(folder, "torch", rank), rank=rank, node=node_name())
    answers.give_up_after(limit_s)
    answers.facts["DeepEP and NVSHMEM"] = library_versions()
    on_gpu = torch.cuda.is_available() and not cpu
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    answers.ask("torch GPUs", lambda: visible_gpus(plan.gpus_per_node, plan.tasks_per_node, cpu=cpu), node=answers.node)
    answers.ask("GEMM", lambda: gemm(device), node=answers.node)
    worlds: list[World] = []

    def join() -> Probe:
        worlds.append(join_world(cpu=cpu, timeout=timedelta(seconds=join_limit_s)))
        return passed(worlds[0].size, message="nccl" if on_gpu else "gloo")

    if answers.ask("join", join, node=JOB):
        limits = plan.limits
        answers.ask("all-reduce", lambda: all_reduce(worlds[0], limits["all_reduce_gb_per_s"]), node=JOB)
        answers.ask("all-to-all", lambda: all_to_all(worlds[0], limits["all_to_all_gb_per_s"]), node=JOB)
        answers.ask("neighbour link", lambda: neighbour(worlds[0], plan), node=answers.node)
        answers.ask("DeepEP", lambda: deep_ep(worlds[0]), node=JOB)
        answers.now = "leave"
    answers.write_and_end()


def library_versions() -> str:
    """Versions that must agree over all ranks, as one line."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return " ".join(f"{name} {number}" for name, number in found.items())


def visible_gpus(gpus_per_node: int, tasks_per_node: int, *, cpu: bool = False) -> Probe:
    """torch sees a GPU for every task of the node."""
    if gpus_per_node == 0 or cpu:
        return not_available("the job uses no GPUs")
    if not torch.cuda.is_available():
        return not_available("torch sees no CUDA device; ranks compute on the CPU")
    mend = "srun must give every task all GPUs of its node; look at the driver's mount in the container"
    return at_least(torch.cuda.device_count(), tasks_per_node, mend)


def gemm(device: torch.device, size: int = GEMM_SIZE) -> Probe:
    """A product of small whole numbers, which bfloat16 and float32 hold exactly, against int64 on the CPU.

    The value is TFLOP/s of the bfloat16 product on a GPU.
    """
    small = 256
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (small, small), generator=generator) for _ in range(2))
    known = a @ b
    exact = {}
    for dtype in (torch.bfloat16, torch.float32):
        # bfloat16 rounds the sums, so the known answer is rounded alike; both are exact before that rounding.
        exact[dtype] = torch.equal((a.to(device, dtype) @ b.to(device, dtype)).cpu(), known.to(dtype))
    wrong = [str(dtype).removeprefix("torch.") for dtype, right in exact.items() if not right]
    if wrong:
        return failed(
            f"a {small}x{small} product is wrong in {' and '.join(wrong)}; drain the node, its GPU computes wrong"
        )
    if device.type != "cuda":
        return not_available("no GPU; the known answer is right on the CPU")
    x = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    seconds = timed(lambda: x @ x, device)
    return passed(round(2 * size**3 / seconds / 1e12, 1))


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of one call, after a warm-up."""
    seconds = []
    for round_ in range(WARM_UP + ROUNDS):
        _wait_for(device)
        start = time.perf_counter()
        action()
        _wait_for(device)
        if round_ >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_reduce(world: World, floor_gb_per_s: float | None, num_bytes: int | None = None) -> Probe:
    """The sum over all ranks is right; the value is bus bandwidth in GB/s: 2 (n-1)/n x bytes / seconds."""
    if world.size == 1:
        return not_available("one rank has no peer")
    num_bytes = num_bytes or _num_bytes(world)
    # Whole numbers under 2**24: float32 adds them exactly in any order.
    pattern = torch.arange(num_bytes // 4, device=world.device).remainder(251).float()
    mine = pattern * (world.rank + 1)
    dist.all_reduce(mine)
    wrong = int((mine != pattern * (world.size * (world.size + 1) // 2)).sum())
    return _judge(
        world, lambda: dist.all_reduce(mine), 2 * (world.size - 1) / world.size * num_bytes, floor_gb_per_s, wrong
    )


def all_to_all(world: World, floor_gb_per_s: float | None, num_bytes: int | None = None) -> Probe:
    """Every rank gets from every rank what that one sent to it; the value is GB/s that a rank receives from others."""
    if world.size == 1:
        return not_available("one rank has no peer")
    num_bytes = num_bytes or _num_bytes(world)
    ranks, shape = torch.arange(world.size, device=world.device), (world.size, num_bytes // 4 // world.size)
    sent = (world.rank * world.size + ranks).float()[:, None].expand(shape).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    wrong = (received != (ranks * world.size + world.rank).float()[:, None]).any(dim=1).nonzero().flatten().tolist()
    traffic = (world.size - 1) / world.size * num_bytes
    return _judge(world, lambda: dist.all_to_all_single(received, sent), traffic, floor_gb_per_s, len(wrong), wrong)


def _judge(
    world: World,
    action: Callable[[], Any],
    traffic_bytes: float,
    floor: float | None,
    wrong: int,
    sources: list[int] | None = None,
) -> Probe:
    """Time a collective on all ranks together, also where one got wrong numbers: the others wait for it."""
    seconds = max_over_ranks(timed(action, world.device))[0]
    value = round(traffic_bytes / seconds / 1e9, 3)
    if wrong:
        what = f"parts from ranks {', '.join(map(str, sources))}" if sources else f"{wrong} numbers"
        return failed(f"rank {world.rank} on {node_name()} received wrong numbers: {what}", value=value, floor=floor)
    if floor is None:
        return passed(value)
    return at_least(value, floor, f"{value:g} GB/s is less than the cluster file's floor; look at the neighbour links")


def neighbour(world: World, plan: Plan, num_bytes: int | None = None) -> Probe:
    """GB/s that this rank receives from the same place on the node before, all nodes at once: a node with a slow link
    stands out, since it is slow as a receiver and its next node too."""
    if len(plan.nodes) == 1:
        return not_available("one node has no neighbour")
    num_bytes = num_bytes or _num_bytes(world)
    step = plan.tasks_per_node
    after, before = (world.rank + step) % world.size, (world.rank - step) % world.size
    sent = torch.full((num_bytes // 4,), float(world.rank), device=world.device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        moves = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for move in dist.batch_isend_irecv(moves):
            move.wait()

    seconds = timed(exchange, world.device)
    value = round(num_bytes / seconds / 1e9, 3)
    if not bool((received == before).all()):
        return failed(f"rank {world.rank} received wrong numbers from rank {before}", value=value)
    return passed(value)


def deep_ep(world: World) -> Probe:
    """DeepEP and NVSHMEM load on every rank, and a buffer over all ranks exchanges its handles: the ranks shake hands.

    Versions are compared between nodes apart from this.
    """
    try:
        library = importlib.import_module("deep_ep")
        missing = None
    except ImportError as error:
        library, missing = None, error
    here = sum(max_over_ranks(float(library is not None), float(library is None)))
    if here == 2.0:
        said = (
            f"rank {world.rank} on {node_name()} cannot import deep_ep: {first_line(missing)}"
            if missing
            else "other ranks"
        )
        return failed(f"only some ranks have DeepEP: {said}", exit_code=EXIT_ENVIRONMENT)
    if missing is not None and getattr(missing, "name", None) != "deep_ep":
        mend = "its libraries (NVSHMEM) do not fit this image"
        return failed(f"deep_ep cannot be imported: {first_line(missing)}; {mend}", exit_code=EXIT_ENVIRONMENT)
    if library is None:
        return not_available("DeepEP is not installed")
    if world.device.type != "cuda" or world.size == 1:
        return not_available("DeepEP loads; a handshake needs several ranks with GPUs")
    bytes_ = 64 * 2**20
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    buffer = library.Buffer(dist.group.WORLD, num_nvl_bytes=bytes_, num_rdma_bytes=bytes_ if world.size > local else 0)
    max_over_ranks(0.0)
    del buffer
    return passed(getattr(library, "__version__", None), message="a buffer over all ranks was made")


def _num_bytes(world: World) -> int:
    """Divisible by the ranks, so that an all-to-all has equal parts of whole numbers."""
    unit = 4 * world.size
    return (GPU_BYTES if world.device.type == "cuda" else CPU_BYTES) // unit * unit


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    run(read_plan(arguments.folder), arguments.folder, cpu=arguments.cpu)
