"""What one task asks of its node, outside or inside the container, and the record of the answers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

import moe_recipes
from moe_recipes.config.errors import EXIT_ENVIRONMENT, MoeRecipesError, RecipeError
from moe_recipes.config.manifest import make_manifest
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.launch.preflight import container, disk, gpus, inputs, limits
from moe_recipes.launch.preflight.plan import Plan, recipe_hash
from moe_recipes.launch.preflight.probe import Probe, ProbeFunction, failed, passed, probe_to_dict, run_probes

LOCK = Path("/usr/share/moe-recipes/requirements.lock")
"""The lock that the image was built from; without it the list of what is installed stands for it."""

TIME_LIMITS_S = {"data sample": inputs.SAMPLE_LIMIT_S + 10, "checkpoint write": 45.0, "checkpoint read back": 60.0}


def outside_probes(plan: Plan) -> dict[str, ProbeFunction]:
    """What only the node itself can tell: its GPUs and its clock."""
    found, expected = _asked_once(gpus.read_gpus), plan.gpus_per_node
    most_used = int(plan.limits["used_gpu_memory_mib"])
    return {
        "GPU count": lambda: gpus.gpu_count(found(), expected),
        "GPU ECC": lambda: gpus.gpu_ecc(found()),
        "GPU clocks": lambda: gpus.gpu_clocks(found()),
        "GPU memory": lambda: gpus.gpu_memory(found(), most_used),
        "clock": lambda: limits.clock((plan.clock_host, plan.clock_port), plan.limits["time_skew_s"]),
    }


def inside_probes(plan: Plan, recipe: Recipe, node: str) -> dict[str, ProbeFunction]:
    """What a rank of the run would meet."""
    place = disk.checkpoint_folder(Path(plan.run_dir))
    folder, nonce = place / f".preflight-{plan.nonce}", plan.nonce
    floor, shm = plan.limits["checkpoint_gb_per_s"], plan.limits["shm_gib"]
    return {
        "torch": torch_there,
        "/dev/shm": lambda: limits.shared_memory(plan.tasks_per_node, shm),
        "memlock": limits.locked_memory,
        "nofile": lambda: limits.open_files(plan.num_ranks),
        "environment": lambda: container.environment(plan.environment),
        "checkpoint write": lambda: disk.write_probe(folder, node=node, nonce=nonce, floor_gb_per_s=floor),
        "checkpoint read back": lambda: disk.read_back_probe(folder, peer=plan.peer_of(node), nonce=nonce),
        "checkpoint space": lambda: disk.space_probe(place, recipe),
        "checkpoint inodes": lambda: disk.inodes_probe(place, recipe),
        "model files": lambda: inputs.model_files(recipe),
        "offline hub": lambda: inputs.offline_hub(recipe),
        "data sample": lambda: inputs.data_sample(recipe),
        "secrets file": lambda: inputs.secrets_file(plan.secrets),
    }


def torch_there() -> Probe:
    """torch is installed in this Python; the torch probes check that it works."""
    if importlib.util.find_spec("torch") is None:
        mend = "use the image of this project, or set container.python"
        return failed(f"{sys.executable} has no torch; {mend}", exit_code=EXIT_ENVIRONMENT)
    return passed(next((d.version for d in distributions(name="torch")), None))


def outside_facts(plan: Plan) -> dict[str, str | None]:
    """What must be equal on all nodes and is seen outside the container."""
    try:
        driver = gpus.driver_of(gpus.read_gpus())
    except (MoeRecipesError, OSError):
        driver = None  # the probe of the GPUs says why
    return {"driver": driver, "image": _readable(lambda: container.image_sample(plan.image))}


def inside_facts(plan: Plan, recipe: Recipe | None) -> dict[str, str | None]:
    """What must be equal on all nodes and is seen inside."""
    made_of = make_manifest(plan.recipe)
    versions = {"python": made_of["python"], **made_of["packages"]}
    commit = (made_of["git"] or {}).get("commit")
    installed = sorted(f"{d.metadata['Name']}=={d.version}" for d in distributions())
    lock = LOCK.read_bytes() if LOCK.is_file() else "\n".join(installed).encode()
    return {
        "recipe": recipe_hash(plan.recipe),
        "root file system": _readable(container.root_identity) if plan.runtime != "none" else None,
        "lock": hashlib.sha256(lock).hexdigest()[:16],
        "packages": " ".join(f"{name} {version}" for name, version in versions.items() if version is not None),
        "code": f"{code_hash()}{f' of commit {commit[:12]}' if commit else ''}",
        "model revision": None if recipe is None else _readable(lambda: inputs.revision_of(recipe)),
    }


def code_hash(folder: Path | None = None) -> str:
    """A hash of this package's Python files as this node reads them."""
    root = folder or Path(moe_recipes.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def ask(side: Literal["outside", "inside"], plan: Plan, *, rank: int, node: str) -> dict[str, Any]:
    """The record of a node. Without a container both sides are the same, and are asked at once."""
    outside = side == "outside" or plan.runtime == "none"
    probes, facts = (outside_probes(plan), outside_facts(plan)) if outside else ({}, {})
    broken: list[Probe] = []
    if side == "inside":
        recipe = None
        try:
            recipe = recipe_from_dict(plan.recipe)
            probes |= inside_probes(plan, recipe, node)
        except RecipeError as error:
            said = f"this node's code does not know the recipe: {error}"
            broken.append(dataclasses.replace(failed(said, exit_code=error.exit_code), name="recipe", node=node))
        facts |= inside_facts(plan, recipe)
    found = [*broken, *run_probes(probes, node=node, time_limits_s=TIME_LIMITS_S)]
    return {
        "rank": rank,
        "node": node,
        "host": os.uname().nodename,
        "time": time.time(),
        "facts": facts,
        "environment": container.environment_facts(os.environ),
        "probes": [probe_to_dict(probe) for probe in found],
    }


def _asked_once(read: Callable[[], list[gpus.Gpu] | None]) -> Callable[[], list[gpus.Gpu] | None]:
    """Four probes look at one answer of nvidia-smi; an error is each one's."""
    answers: list[list[gpus.Gpu] | None] = []
    errors: list[Exception] = []
    try:
        answers.append(read())
    except (MoeRecipesError, OSError) as error:
        errors.append(error)

    def answer() -> list[gpus.Gpu] | None:
        if errors:
            raise errors[0]
        return answers[0]

    return answer


def _readable(read: Callable[[], str | None]) -> str | None:
    """A fact, or None where it cannot be read; the probe of the same thing says why."""
    try:
        return read()
    except (OSError, MoeRecipesError):
        return None
