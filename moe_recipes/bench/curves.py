"""Does it learn the same? ``python -m moe_recipes.bench.curves RECIPE [--seeds 0,1,2]``: learning curves of both arms.

Each curve is a process of its own (``learn.py``), so is each clock. With ``--jobs N`` so many curves run at a time,
dealt to the host's GPUs in turn: they share them, so that their times say nothing, and the seconds of a step are
measured afterwards, one arm alone at a time.

The curves overlay where the two arms with one seed are no further apart than two seeds of one arm: both are means over
windows of steps, taken as root mean squares over all windows and pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

from moe_recipes.bench.host import gpus, visible_gpus
from moe_recipes.bench.pictures import BLUE, ORANGE, pyplot, running_mean
from moe_recipes.config.errors import InfrastructureError, MoeRecipesError, RecipeError
from moe_recipes.config.manifest import make_manifest
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import write_json

ARMS = ("ours", "transformers")
Curves = dict[str, dict[int, list[float]]]
"""Arm -> seed -> the loss of each step."""


def learn(recipe: Recipe, arm: str, *, steps: int, gpu: str | None) -> dict[str, list[float]]:
    """Run one arm for ``steps`` steps: losses and seconds of each.

    Raises:
        InfrastructureError: it failed; the last line of what it said.
    """
    out = Path(tempfile.mkdtemp(prefix="moe-recipes-curves-")) / "curve.json"
    command = [
        sys.executable,
        "-m",
        "moe_recipes.bench.learn",
        arm,
        "--recipe-json",
        json.dumps(recipe_to_dict(recipe)),
    ]
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    done = subprocess.run(
        [*command, "--steps", str(steps), "--out", str(out)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InfrastructureError(f"{arm}, seed {recipe.train.seed}: {said[-1]}")
    return dict(json.loads(out.read_text()))


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed))


def windows(losses: Sequence[float], size: int) -> list[float]:
    """Means over consecutive windows; a last one that is not full is left out."""
    return [mean(losses[start : start + size]) for start in range(0, len(losses) - size + 1, size)]


def distance(left: Sequence[float], right: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return (sum((a - b) ** 2 for a, b in zip(left, right, strict=True)) / len(left)) ** 0.5


def compare(curves: Curves, *, window: int) -> dict[str, float]:
    """How far the arms are apart with one seed, and the seeds within one arm, in nats per label token."""
    smooth = {arm: {seed: windows(losses, window) for seed, losses in found.items()} for arm, found in curves.items()}
    ours, theirs = (smooth[arm] for arm in ARMS)
    between_arms = [distance(ours[seed], theirs[seed]) for seed in ours]
    between_seeds = [distance(*pair) for found in smooth.values() for pair in itertools.combinations(found.values(), 2)]
    last = {arm: mean(found[-1] for found in smooth[arm].values()) for arm in ARMS}
    return {
        "between_arms": mean(between_arms),
        "between_seeds": mean(between_seeds),
        "last_window_ours": last["ours"],
        "last_window_transformers": last["transformers"],
    }


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """Steps until the running mean is at ``target`` or below; None if it never is."""
    found = (number for number, value in enumerate(running_mean(losses), start=1) if value <= target)
    return next(found, None)


def seconds_to_equal_loss(curves: Curves, step_s: dict[str, float]) -> dict[str, Any]:
    """Steps and seconds of each arm's mean curve until the worse arm's last loss."""
    means = {arm: [mean(column) for column in zip(*curves[arm].values(), strict=True)] for arm in ARMS}
    target = max(running_mean(losses)[-1] for losses in means.values())
    steps = {arm: steps_to(losses, target) for arm, losses in means.items()}
    return {
        "target_loss": target,
        "steps": steps,
        "seconds": {arm: number * step_s[arm] for arm, number in steps.items() if number is not None},
    }


def picture(curves: Curves, out_png: Path) -> None:
    """All curves as running means, one colour an arm.

    Raises:
        EnvironmentMismatchError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for arm, colour in zip(ARMS, (BLUE, ORANGE), strict=True):
        for index, losses in enumerate(curves[arm].values()):
            label = None if index else f"{arm}, {len(curves[arm])} seeds"
            axes.plot(
                range(1, len(losses) + 1), running_mean(losses), color=colour, linewidth=1, alpha=0.8, label=label
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per label token), running mean")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.bench.curves")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; two or more")
    parser.add_argument("--jobs", type=int, default=1, help="curves at a time")
    parser.add_argument("--window", type=int, default=25, help="steps in one mean of the comparison")
    parser.add_argument("--clock-steps", type=int, default=40, help="steps that each arm is timed alone")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the picture has its name and .png")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE of the recipe")
    return parser.parse_args()


def checked(arguments: argparse.Namespace) -> tuple[Recipe, list[int]]:
    """The recipe and the seeds.

    Raises:
        RecipeError: more than one rank, seeds that are not two different numbers, or fewer steps than two windows.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.parallel.num_ranks != 1:
        raise RecipeError(f"{arguments.recipe}: curves run on one rank each; set parallel.fsdp_size and ep_size to 1")
    words = arguments.seeds.split(",")
    if len(set(words)) < 2 or not all(word.isdecimal() for word in words):
        raise RecipeError(f"--seeds {arguments.seeds}: give two or more different whole numbers, as in 0,1,2")
    if min(arguments.jobs, arguments.window, arguments.clock_steps) < 1:
        raise RecipeError("--jobs, --window and --clock-steps must each be at least 1")
    if recipe.train.steps < 2 * arguments.window:
        raise RecipeError(f"train.steps={recipe.train.steps}: fewer than two windows; set --window lower")
    if not arguments.out.parent.is_dir():
        raise RecipeError(f"--out {arguments.out}: the folder is not there")
    return recipe, [int(word) for word in words]


def measure(recipe: Recipe, seeds: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """All curves, then both clocks."""
    visible = visible_gpus()
    pairs = list(itertools.product(ARMS, seeds))

    def one(numbered: tuple[int, tuple[str, int]]) -> list[float]:
        index, (arm, seed) = numbered
        gpu = visible[index % len(visible)] if visible else None
        return learn(with_seed(recipe, seed), arm, steps=recipe.train.steps, gpu=gpu)["losses"]

    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        losses = dict(zip(pairs, pool.map(one, enumerate(pairs)), strict=True))
    curves: Curves = {arm: {seed: losses[arm, seed] for seed in seeds} for arm in ARMS}
    gpu = visible[0] if visible else None
    step_s = {}
    for arm in ARMS:
        clocked = learn(recipe, arm, steps=arguments.clock_steps, gpu=gpu)["step_s"]
        step_s[arm] = median(clocked[len(clocked) // 2 :])
    return {
        "gpus": gpus(),
        "curves": curves,
        "compare": compare(curves, window=arguments.window),
        "step_s": step_s,
        "equal_loss": seconds_to_equal_loss(curves, step_s),
        "manifest": {**make_manifest(recipe_to_dict(recipe)), "command": ["moe_recipes.bench.curves", *sys.argv[1:]]},
    }


def main() -> int:
    arguments = parse()
    try:
        recipe, seeds = checked(arguments)
        card = measure(recipe, seeds, arguments)
        write_json(arguments.out, card)
        picture(card["curves"], arguments.out.with_suffix(".png"))
    except MoeRecipesError as error:
        print(f"moe-recipes: error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({key: card[key] for key in ("compare", "step_s", "equal_loss")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
