"""Compare arms on one recipe, in one call on one host: ``moe-recipes bench RECIPE``.

Every arm is a set of processes of its own, one after the other, so none inherits another's memory or kernels. A figure
is only worth its ratio to the others of the same file: hosts differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import InfrastructureError, MoeRecipesError
from moe_recipes.config.manifest import make_manifest
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder, write_json
from moe_recipes.launch.local import run_ranks


def gpus() -> list[str]:
    """``name, driver, memory`` of every GPU of this host, by nvidia-smi; empty without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def run_arm(recipe: Recipe, *, arm: str, gate: str, steps: int, warmup: int) -> dict[str, Any]:
    """Result of one arm, or ``{"arm", "gate", "failed": reason}``: one arm out of memory must not lose the others."""
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="moe-recipes-bench-")))
    out = folder.path / "result.json"
    command = [sys.executable, "-m", "moe_recipes.bench.arm", arm, "--gate", gate, "--out", str(out)]
    command += ["--steps", str(steps), "--warmup", str(warmup), "--recipe-json", json.dumps(recipe_to_dict(recipe))]
    code, _ = run_ranks(command, num_ranks=recipe.parallel.num_ranks, folder=folder, uses_status=False)
    if code == 0:
        return dict(json.loads(out.read_text()))
    log = (folder.attempts / "latest" / "rank-00000.log").read_text(errors="replace").strip()
    return {"arm": arm, "gate": gate, "failed": log.splitlines()[-1] if log else f"exit code {code}"}


def points(arguments: argparse.Namespace, arm: str) -> Iterator[Recipe]:
    """The arm's recipe at each expert degree and each batch size that is asked for; its own where none is."""
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *getattr(arguments, f"{arm}_overrides")])
    for ep_size in whole_numbers(arguments.ep_sizes) or [recipe.parallel.ep_size]:
        for rows in whole_numbers(arguments.batches) or [recipe.train.micro_batch_size]:
            yield dataclasses.replace(
                recipe,
                parallel=dataclasses.replace(recipe.parallel, ep_size=ep_size),
                train=dataclasses.replace(recipe.train, micro_batch_size=rows),
            )


def whole_numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def table(results: list[dict[str, Any]]) -> str:
    """The figures as aligned text."""
    lines = [
        f"{'arm':<14}{'gate':<10}{'EP':>3}{'rows':>5}{'tok/s/GPU':>11}{'no optim':>10}{'alloc GiB':>11}{'reserved':>10}"
    ]
    for r in results:
        head = f"{r['arm']:<14}{r['gate']:<10}{r['ep_size']:>3}{r['micro_batch_size']:>5}"
        if "failed" in r:
            lines.append(f"{head}  failed: {r['failed'][:90]}")
            continue
        speed, bare = r["tokens_per_s_per_gpu"], r["tokens_per_s_per_gpu_without_optimizer"]
        memory = f"{r['peak_allocated_gib']:>11.1f}{r['peak_reserved_gib']:>10.1f}"
        lines.append(f"{head}{speed:>11,.0f}{bare:>10,.0f}{memory}")
    return "\n".join(lines)


def measured(recipe: Recipe, arguments: argparse.Namespace, *, arm: str, gate: str) -> dict[str, Any]:
    """``run_arm``, and what the arm's recipe says of its layout."""
    result = run_arm(recipe, arm=arm, gate=gate, steps=arguments.steps, warmup=arguments.warmup)
    return {
        **result,
        "ep_size": recipe.parallel.ep_size,
        "micro_batch_size": recipe.train.micro_batch_size,
        "activation_checkpointing": recipe.train.activation_checkpointing,
    }


def write_card(arguments: argparse.Namespace, recipe: Recipe, results: list[dict[str, Any]]) -> None:
    """The file so far: a call that is cut short keeps what it measured."""
    words = [arguments.out.name if word == str(arguments.out) else word for word in sys.argv[1:]]
    command = ["moe-recipes", "bench", *words]
    manifest = {**make_manifest(recipe_to_dict(recipe)), "command": command}
    card = {"gpus": gpus(), "steps": arguments.steps, "warmup": arguments.warmup, "results": results}
    write_json(arguments.out, {**card, "manifest": manifest})


def main() -> int:
    parser = argparse.ArgumentParser(prog="moe-recipes bench")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("--out", type=Path, help="JSON file; RECIPE's name and .bench.json in this folder if not given")
    parser.add_argument("--arms", default="ours,transformers")
    parser.add_argument("--gates", default="real,balanced")
    parser.add_argument("--ep-sizes", default="", help="comma-separated; the recipe's own if not given")
    parser.add_argument("--batches", default="", help="comma-separated rows a rank; the recipe's own if not given")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE for both arms")
    for arm in ("ours", "transformers"):
        parser.add_argument(f"--{arm}", action="append", default=[], dest=f"{arm}_overrides", help="KEY=VALUE for it")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    arguments.out = arguments.out or Path(f"{Path(arguments.recipe).stem}.bench.json")
    try:
        if not arguments.out.parent.is_dir():
            raise InfrastructureError(f"--out {arguments.out}: the folder is not there")
        pairs = zip(points(arguments, "ours"), points(arguments, "transformers"), strict=True)
        for ours, transformers in list(pairs):
            for gate in arguments.gates.split(","):
                recipes = {"ours": ours, "transformers": transformers}
                for arm in arguments.arms.split(","):
                    results.append(measured(recipes[arm], arguments, arm=arm, gate=gate))
                    print(table(results[-1:]), flush=True)
                    write_card(arguments, ours, results)
    except MoeRecipesError as error:
        print(f"moe-recipes: error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(results))
    return 1 if any("failed" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
