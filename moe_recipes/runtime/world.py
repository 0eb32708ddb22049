"""Who this rank is, and the process group that all ranks share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from moe_recipes.config.errors import EnvironmentMismatchError, InfrastructureError, OtherRankError, exit_code_of

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks. ``device`` is where its tensors live."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    host: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_variables(environ: dict[str, str]) -> tuple[int, int, int]:
    """``(rank, local_rank, size)`` from torchrun's variables, else from srun's, else one process.

    Raises:
        InfrastructureError: some but not all variables are set, or a value is not a number.
    """
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return int(environ["RANK"]), int(environ.get("LOCAL_RANK", 0)), int(environ["WORLD_SIZE"])
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            return (
                int(environ["SLURM_PROCID"]),
                int(environ["SLURM_LOCALID"]),
                int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])),
            )
    except (KeyError, ValueError) as error:
        raise InfrastructureError(f"rank variables are incomplete or not numbers: {error}") from error
    return 0, 0, 1


def join_world(*, cpu: bool = False, timeout: timedelta = TIMEOUT) -> World:
    """Join the ranks that the environment describes, and make the default process group.

    The group carries gloo for CPU tensors and, on GPUs, NCCL for CUDA tensors, so that small host-side
    agreements never wait for the device. One process alone gets a group of size 1.

    Args:
        cpu: stay on the CPU even where there are GPUs.
        timeout: of the meeting, and of every collective after it.
    Raises:
        InfrastructureError: MASTER_ADDR or MASTER_PORT is missing with several ranks.
        EnvironmentMismatchError: fewer GPUs than ranks on this host.
    """
    rank, local_rank, size = rank_variables(dict(os.environ))
    device = torch.device("cpu")
    if not cpu and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentMismatchError(
                f"rank {rank} is number {local_rank} on {socket.gethostname()}, which shows"
                f" {torch.cuda.device_count()} GPUs; start one rank a GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise InfrastructureError(
                    f"{size} ranks but no {' and '.join(missing)} in the environment; start the ranks with"
                    f" `moe-recipes train` or torchrun, or export these for srun: rank 0's host and a free port of it"
                )
            os.environ.setdefault("RANK", str(rank))
            os.environ.setdefault("WORLD_SIZE", str(size))
            os.environ.setdefault("LOCAL_RANK", str(local_rank))
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return World(rank=rank, local_rank=local_rank, size=size, device=device, host=socket.gethostname())


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks, through the CPU group; float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def max_over_ranks(*values: float) -> list[float]:
    """Each value's maximum over all ranks, through the CPU group; float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def barrier() -> None:
    """Return when every rank is here. Goes through the CPU group: device queues keep running."""
    max_over_ranks(0.0)


def wait_for_main(what: str, *, is_main: bool) -> None:
    """Return when rank 0 has called this too, however long that takes: a collective would end after ``TIMEOUT``.

    Args:
        what: names this wait; one name, one use in a process's life.
    """
    if dist.get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        if is_main:
            store.set(what, "ready")
        else:
            store.wait([what], timedelta(days=7))
    barrier()


def agree(ok: bool) -> bool:
    """True if it is True on every rank."""
    return max_over_ranks(0.0 if ok else 1.0)[0] == 0.0


def together(action: Callable[[], T]) -> T:
    """``action()`` on every rank; if it raises on one, every rank raises, so that none waits in the next collective.

    Raises:
        OtherRankError: it failed on another rank; message and exit code are that rank's.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if agree(error is None):
        return result  # type: ignore[return-value]
    mine = None if error is None else (str(error) or type(error).__name__, exit_code_of(error))
    said: list[tuple[str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    if error is not None:
        raise error
    rank, (message, exit_code) = next((rank, one) for rank, one in enumerate(said) if one is not None)
    raise OtherRankError(message, rank=rank, exit_code=exit_code)
