"""What the nodes are asked, and the files by which they answer: all in one folder, ``attempts/<n>/preflight/``.

plan.json          the question, written by the batch host            outside-NNNNN.json   a node, outside the container
probe-NNNNN.json   a node, inside it; NNNNN is the rank that asked      torch-NNNNN.json     a rank, with torch
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError
from moe_recipes.config.run_folder import write_json

FOLDER = "preflight"
PLAN = "plan.json"
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The question. Plain data, so that nodes with another version of the code can still answer that they differ."""

    recipe: dict[str, Any]
    run_dir: str
    nodes: tuple[str, ...]
    """Names of the nodes in the order of their first ranks."""

    tasks_per_node: int
    gpus_per_node: int
    nonce: str
    """Says which files on the checkpoint file system are of this preflight."""

    clock_host: str
    clock_port: int
    environment: dict[str, str]
    """What every task is to find in its environment, secrets left out."""

    runtime: str
    """The container's runtime."""

    image: str | None
    secrets: str | None
    """Path of the file of secrets."""

    limits: dict[str, Any]
    """The cluster file's limits."""

    @property
    def num_ranks(self) -> int:
        return len(self.nodes) * self.tasks_per_node

    def peer_of(self, node: str) -> str:
        """The node whose file ``node`` reads back: the next one; itself if it is alone."""
        return self.nodes[(self.nodes.index(node) + 1) % len(self.nodes)]


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a resolved recipe, 16 digits."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def is_secret(name: str) -> bool:
    """Whether a variable's value must not be written anywhere."""
    return any(word in name.upper() for word in SECRET_WORDS)


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan into the folder of a preflight.

    Raises:
        CannotWriteError: the folder cannot be written.
    """
    write_json(folder / PLAN, {**vars(plan), "nodes": list(plan.nodes)})


def read_plan(folder: Path) -> Plan:
    """The plan in the folder of a preflight.

    Raises:
        MissingInputError: there is none, or this node does not see it.
        CorruptCheckpointError: another version of this package wrote it.
    """
    path = folder / PLAN
    try:
        data = json.loads(path.read_bytes())
        return Plan(**{**data, "nodes": tuple(data["nodes"])})
    except OSError as error:
        raise MissingInputError(
            f"{path}: {error.strerror} on {node_name()}; is the run folder mounted here?"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCheckpointError(f"{path}: not a plan of this version ({error}); start the job again") from error


def node_name() -> str:
    """This node's name in Slurm, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename.split(".")[0]


def record_path(folder: Path, kind: str, rank: int) -> Path:
    """``kind`` is ``outside``, ``probe`` or ``torch``."""
    return folder / f"{kind}-{rank:05d}.json"


def read_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The answers of one kind that are there and whole, by rank."""
    records = []
    for path in sorted(folder.glob(f"{kind}-*.json")):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue  # a node that died while it wrote; it counts as one that did not answer
        if isinstance(record, dict):
            records.append(record)
    return records
