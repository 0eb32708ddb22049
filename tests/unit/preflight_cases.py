"""A plan and records for the tests of the preflight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moe_recipes.config.cluster import Limits
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict, recipe_to_dict
from moe_recipes.launch.preflight.plan import Plan
from moe_recipes.launch.preflight.probe import Probe, probe_to_dict


def make_recipe(**sections: dict[str, Any]) -> Recipe:
    """A tiny recipe of random tokens, with sections laid over it."""
    plain: dict[str, Any] = {
        "name": "case",
        "model": {"source": "package:tiny_qwen3_moe", "weights": "random", "dtype": "float32"},
        "data": {"format": "random_tokens", "seq_len": 32},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
    }
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section}
    return recipe_from_dict(plain)


def make_plan(folder: Path, *, recipe: Recipe | None = None, **changes: Any) -> Plan:
    plan = Plan(
        recipe=recipe_to_dict(recipe or make_recipe()),
        run_dir=str(folder),
        nodes=("node1",),
        tasks_per_node=1,
        gpus_per_node=0,
        nonce="aa55",
        clock_host="127.0.0.1",
        clock_port=1,
        environment={},
        runtime="none",
        image=None,
        secrets=None,
        limits=dataclasses.asdict(Limits()),
    )
    return dataclasses.replace(plan, **changes)


def record(node: str, *probes: Probe, rank: int = 0, **facts: str | None) -> dict[str, Any]:
    """A node's answer as it lies in the preflight's folder."""
    named = [probe_to_dict(dataclasses.replace(probe, node=node)) for probe in probes]
    return {"rank": rank, "node": node, "facts": facts, "environment": {}, "probes": named}
