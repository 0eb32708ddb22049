"""Compare arms on one recipe, in one call on one host: ``moe-recipes bench RECIPE``.

Every arm is a set of processes of its own, one after the other, so none inherits another's memory or kernels. A figure
is only worth its ratio to the others of the same file: hosts differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_recipes.bench.automodel import AutoModelPlace, environment_of, missing
from moe_recipes.bench.automodel import command as automodel_command
from moe_recipes.bench.host import check_arm, gpus
from moe_recipes.bench.sweep import OUT_OF_MEMORY, largest_rows, longest_sequence
from moe_recipes.config.errors import EXIT_REQUEUE, InfrastructureError, MoeRecipesError, RecipeError, StoppedError
from moe_recipes.config.manifest import make_manifest
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder, write_json
from moe_recipes.launch.local import run_ranks

ARMS = ("ours", "transformers", "automodel")
GATES = ("real", "balanced")
ERROR_LINE = re.compile(r"\s*(\[rank\d+\]: *)?([\w.]+(Error|Exception)\b|.*: error: )")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long each arm runs, and where the rival is."""

    steps: int
    warmup: int
    rival: AutoModelPlace


def run_arm(recipe: Recipe, timing: Timing, *, arm: str, gate: str) -> dict[str, Any]:
    """Result of one arm, or ``{"failed": reason}`` or ``{"missing": reason}``: one arm out of memory must not lose the
    others.

    Raises:
        StoppedError: a signal ended it.
    """
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="moe-recipes-bench-")))
    out, named = folder.path / "result.json", {"arm": arm, "gate": gate}
    clock = {"steps": timing.steps, "warmup": timing.warmup}
    if arm == "automodel":
        if reason := missing(recipe, timing.rival):
            return {**named, "missing": reason}
        command = automodel_command(recipe, timing.rival, gate=gate, out=out, **clock)
    else:
        command = [sys.executable, "-m", "moe_recipes.bench.arm", arm, "--gate", gate, "--out", str(out)]
        command += [word for key, value in clock.items() for word in (f"--{key}", str(value))]
        command += ["--recipe-json", json.dumps(recipe_to_dict(recipe))]
    code, _ = run_ranks(command, num_ranks=recipe.parallel.num_ranks, folder=folder, uses_status=False)
    if code == 0:
        return {**named, **json.loads(out.read_text())}
    if code == EXIT_REQUEUE:
        raise StoppedError(f"stopped by a signal while {arm} ran; what was measured before is kept")
    logs = [path.read_text(errors="replace") for path in sorted((folder.attempts / "latest").glob("rank-*.log"))]
    return {**named, "failed": failure(logs) or f"exit code {code}"}


def failure(logs: list[str]) -> str | None:
    """The last error that each rank's log names; of them one about memory where there is one, since the other ranks
    then fail for its sake."""
    named = [[line.strip() for line in log.splitlines() if ERROR_LINE.match(line)] for log in logs]
    last = [lines[-1] for lines in named if lines]
    return next((line for line in last if OUT_OF_MEMORY.search(line)), last[0] if last else None)


def points(arguments: argparse.Namespace, arm: str) -> Iterator[Recipe]:
    """The arm's recipe at each expert degree and each batch size that is asked for; its own where none is."""
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *getattr(arguments, f"{arm}_overrides", [])])
    for ep_size in whole_numbers(arguments.ep_sizes, "--ep-sizes") or [recipe.parallel.ep_size]:
        for rows in whole_numbers(arguments.batches, "--batches") or [recipe.train.micro_batch_size]:
            yield dataclasses.replace(
                recipe,
                parallel=dataclasses.replace(recipe.parallel, ep_size=ep_size),
                train=dataclasses.replace(recipe.train, micro_batch_size=rows),
            )


def whole_numbers(text: str, option: str) -> list[int]:
    """Comma-separated numbers from 1 on.

    Raises:
        RecipeError: a word is none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := next((word for word in words if not word.isdecimal() or int(word) < 1), None):
        raise RecipeError(f"{option} {wrong}: give whole numbers from 1 on, as in 1,2,4")
    return [int(word) for word in words]


def check_clock(*, steps: int, warmup: int) -> None:
    """Raises:
    RecipeError: nothing would be timed.
    """
    if steps < 1 or warmup < 0:
        raise RecipeError(f"--steps {steps} --warmup {warmup}: time at least 1 step, after 0 or more")


def table(results: list[dict[str, Any]]) -> str:
    """The figures as aligned text."""
    lines = [
        f"{'arm':<14}{'gate':<10}{'EP':>3}{'rows':>5}{'seq':>7}{'tok/s/GPU':>11}{'no optim':>10}{'alloc GiB':>11}"
        f"{'reserved':>10}"
    ]
    for r in results:
        head = f"{r['arm']:<14}{r['gate']:<10}{r['ep_size']:>3}{r['micro_batch_size']:>5}{r['seq_len']:>7}"
        if why := next((f"{word}: {r[word]}" for word in ("failed", "missing") if word in r), None):
            lines.append(f"{head}  {why[:90]}")
            continue
        speed, bare = r["tokens_per_s_per_gpu"], r.get("tokens_per_s_per_gpu_without_optimizer")
        memory = f"{r['peak_allocated_gib']:>11.1f}{r['peak_reserved_gib']:>10.1f}"
        lines.append(f"{head}{speed:>11,.0f}{f'{bare:,.0f}' if bare else '-':>10}{memory}")
    return "\n".join(lines)


def measured(recipe: Recipe, timing: Timing, *, arm: str, gate: str) -> dict[str, Any]:
    """``run_arm``, and what the arm's recipe says of its layout."""
    result = run_arm(recipe, timing, arm=arm, gate=gate)
    full = timing.rival.recompute if arm == "automodel" else recipe.train.activation_checkpointing == "full"
    return {
        **result,
        "ep_size": recipe.parallel.ep_size,
        "micro_batch_size": recipe.train.micro_batch_size,
        "seq_len": recipe.data.seq_len,
        "activation_checkpointing": "full" if full else "none",
    }


def write_card(arguments: argparse.Namespace, recipe: Recipe, results: list[dict[str, Any]]) -> None:
    """The file so far: a call that is cut short keeps what it measured."""
    words = [arguments.out.name if word == str(arguments.out) else word for word in sys.argv[1:]]
    command = ["moe-recipes", "bench", *words]
    manifest = {**make_manifest(recipe_to_dict(recipe)), "command": command}
    card = {"gpus": gpus(), "steps": arguments.steps, "warmup": arguments.warmup, "results": results}
    write_json(arguments.out, {**card, "manifest": manifest})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="moe-recipes bench")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/")
    parser.add_argument("--out", type=Path, help="JSON file; RECIPE's name and .bench.json in this folder if not given")
    parser.add_argument("--arms", default="ours,transformers", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--gates", default="real,balanced")
    parser.add_argument("--ep-sizes", default="", help="comma-separated; the recipe's own if not given")
    parser.add_argument("--batches", default="", help="comma-separated rows a rank; the recipe's own if not given")
    parser.add_argument("--sweep", action="store_true", help="find what fits: the most rows, the longest sequence")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE for both arms")
    for arm in ("ours", "transformers"):
        parser.add_argument(f"--{arm}", action="append", default=[], dest=f"{arm}_overrides", help="KEY=VALUE for it")
    parser.add_argument("--automodel-python", default=sys.executable, help="the interpreter that has nemo_automodel")
    parser.add_argument(
        "--automodel-env", action="append", default=[], metavar="KEY=VALUE", help="for that interpreter"
    )
    parser.add_argument("--automodel-backend", choices=["te", "torch"], default="te")
    parser.add_argument("--automodel-recompute", action="store_true", help="its activation checkpointing")
    return parser.parse_args()


def checked(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Arms and gates.

    Raises:
        RecipeError: a name that is none, or no step. InfrastructureError: no folder for the file.
    """
    if not arguments.out.parent.is_dir():
        raise InfrastructureError(f"--out {arguments.out}: the folder is not there")
    check_clock(steps=arguments.steps, warmup=arguments.warmup)
    chosen = []
    for option, known in (("arms", ARMS), ("gates", GATES)):
        words = getattr(arguments, option).split(",")
        if wrong := next((word for word in words if word not in known), None):
            raise RecipeError(f"--{option} {wrong}: must be of {', '.join(known)}")
        chosen.append(words)
    return chosen[0], chosen[1]


def main() -> int:
    arguments = parse()
    results: list[dict[str, Any]] = []
    arguments.out = arguments.out or Path(f"{Path(arguments.recipe).stem}.bench.json")
    try:
        arms, gates = checked(arguments)
        rival = AutoModelPlace(
            python=arguments.automodel_python,
            environment=environment_of(arguments.automodel_env),
            backend=arguments.automodel_backend,
            recompute=arguments.automodel_recompute,
        )
        timing = Timing(steps=arguments.steps, warmup=arguments.warmup, rival=rival)
        recipes_of = {arm: list(points(arguments, arm)) for arm in arms}
        for recipe in (recipe for arm in arms if arm != "automodel" for recipe in recipes_of[arm]):
            check_arm(recipe)

        def measure(recipe: Recipe, arm: str, gate: str, **more: Any) -> dict[str, Any]:
            results.append({**measured(recipe, timing, arm=arm, gate=gate), **more})
            print(table(results[-1:]), flush=True)
            write_card(arguments, next(iter(recipes_of.values()))[0], results)
            return results[-1]

        for recipes in zip(*recipes_of.values(), strict=True):
            for gate, (arm, recipe) in itertools.product(gates, zip(arms, recipes, strict=True)):
                if arguments.sweep:
                    largest_rows(recipe, functools.partial(measure, arm=arm, gate=gate, sweep="rows"))
                    longest_sequence(recipe, functools.partial(measure, arm=arm, gate=gate, sweep="seq_len"))
                else:
                    measure(recipe, arm, gate)
    except MoeRecipesError as error:
        print(f"moe-recipes: error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(results))
    return 1 if any("failed" in result for result in results) and not arguments.sweep else 0


if __name__ == "__main__":
    sys.exit(main())
