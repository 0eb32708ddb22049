"""The work ``probe``: every task writes where it landed. Needs no torch, so that 128 of them start on a small host."""

from __future__ import annotations

import os
import platform
import resource
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moe_recipes
from moe_recipes.config.recipe import Parallel
from moe_recipes.config.run_folder import now, write_json
from moe_recipes.launch.slurm.spec import JobSpec


def mesh_place(rank: int, parallel: Parallel) -> dict[str, int]:
    """Where a rank stands in the recipe's mesh: neighbours share an expert group, as Transformers lays them out."""
    fsdp_rank = rank % parallel.fsdp_size
    return {
        "dp_replicate_rank": rank // parallel.fsdp_size,
        "fsdp_rank": fsdp_rank,
        "efsdp_rank": fsdp_rank // parallel.ep_size,
        "ep_rank": fsdp_rank % parallel.ep_size,
    }


def probe_facts(spec: JobSpec, environ: Mapping[str, str], rank: int) -> dict[str, Any]:
    """Rank, mesh place, container and environment of this task. Of variables only names: values may be keys."""
    return {
        "rank": rank,
        "local_rank": int(environ.get("LOCAL_RANK", 0)),
        "world_size": int(environ.get("WORLD_SIZE", 1)),
        "node": environ.get("SLURMD_NODENAME", ""),
        "host": socket.gethostname(),
        "mesh": mesh_place(rank, spec.read_recipe().parallel),
        "master": f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}",
        "visible_gpus": environ.get("CUDA_VISIBLE_DEVICES", ""),
        "container": container_facts(),
        "environment_names": sorted(environ),
        "moe_recipes": moe_recipes.__version__,
        "code": str(Path(moe_recipes.__file__).parent),
        "time": now(),
    }


def container_facts() -> dict[str, Any]:
    """The root file system as this process sees it. Limits are -1 where there is none."""
    return {
        "os": _os_name(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "cwd": str(Path.cwd()),
        "root_is_writable": not os.statvfs("/").f_flag & os.ST_RDONLY,
        "uid": os.getuid(),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def write_probe(spec: JobSpec, attempt: Path, rank: int, environ: Mapping[str, str]) -> None:
    """Write ``probe-NNNNN.json``.

    Raises:
        CannotWriteError: the attempt's folder cannot be written.
    """
    write_json(attempt / f"probe-{rank:05d}.json", probe_facts(spec, environ, rank), durable=False)
