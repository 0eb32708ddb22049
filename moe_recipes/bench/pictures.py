"""Pictures of a run from its metrics.jsonl: the loss curve, and how evenly the experts are used. No torch.

python -m moe_recipes.bench.pictures RUN_DIR     writes RUN_DIR/loss_curve.png and RUN_DIR/expert_heat_map.png
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import (
    DataError,
    EnvironmentMismatchError,
    MissingInputError,
    MoeRecipesError,
    RecipeError,
)

SMOOTHING = 0.9
MAX_LAYERS_SHOWN = 8
MAX_LOG2_SHARE = 2.0
"""The heat map's colours end at a quarter and at four times the even share."""

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of metrics.jsonl, in file order.

    Raises:
        MissingInputError: the file cannot be read.
        DataError: a line is not a JSON object with a whole ``step``.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}; give the folder of a run") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is not a whole number")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a record of one step: {error!r}; remove the line") from error
        records.append(record)
    return records


def loss_curve(metrics_jsonl: Path, out_png: Path, *, resumed_at: Sequence[int] = ()) -> None:
    """Training loss of every step, its running mean, the validation loss, and the learning rate below.

    Args:
        resumed_at: steps after which the run was started again; each gets a dashed line.
    Raises:
        DataError: no record has a loss. EnvironmentMismatchError: matplotlib is not installed.
    """
    plt = pyplot()
    records = [record for record in read_metrics(metrics_jsonl) if "loss" in record]
    if not records:
        raise DataError(f"{metrics_jsonl}: no record has a loss")
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(4, 1), layout="constrained")
    top.plot(steps, losses, color=GREY, linewidth=0.8, label="each step")
    top.plot(steps, running_mean(losses), color=BLUE, linewidth=2, label="running mean")
    held_out = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    if held_out:
        top.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", label="validation")
    for index, step in enumerate(resumed_at):
        top.axvline(
            step + 0.5, color="black", linestyle="--", linewidth=1, label="stopped, resumed" if not index else None
        )
    top.set_ylabel("loss (nats per label token)")
    top.set_title(f"{metrics_jsonl.resolve().parent.name}: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    top.legend(frameon=False)
    bottom.plot(steps, [record.get("lr", math.nan) for record in records], color=BLUE)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def running_mean(values: Sequence[float], smoothing: float = SMOOTHING) -> list[float]:
    """Exponential mean that weighs the first values right: the weights of the values so far sum to 1."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = smoothing * mean + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)
        means.append(mean / weight)
    return means


def shown_layers(layers: Sequence[int], limit: int = MAX_LAYERS_SHOWN) -> list[int]:
    """At most ``limit`` layers, evenly spaced, with the first and the last."""
    ordered = sorted(layers)
    if len(ordered) <= limit:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (limit - 1))] for index in range(limit)]


def log2_shares(num_tokens_per_expert: Sequence[int]) -> list[float]:
    """Log2 of each expert's tokens over the even share: 0 is even, 1 is twice; an idle expert is minus infinity."""
    mean = sum(num_tokens_per_expert) / max(1, len(num_tokens_per_expert))
    return [math.log2(count / mean) if count and mean else -math.inf for count in num_tokens_per_expert]


def expert_heat_map(metrics_jsonl: Path, out_png: Path) -> None:
    """Load of every expert over time, one band a layer, and the worst layer's max violation below.

    Raises:
        DataError: no record has ``expert_load``. EnvironmentMismatchError: matplotlib is not installed.
    """
    plt = pyplot()
    records = read_metrics(metrics_jsonl)
    loaded = [record for record in records if record.get("expert_load")]
    if not loaded:
        raise DataError(f"{metrics_jsonl}: no record has expert_load; set log.expert_load_every_steps above 0")
    layers = shown_layers([int(layer) for layer in loaded[0]["expert_load"]])
    num_experts = len(loaded[0]["expert_load"][str(layers[0])])
    columns = [[x for layer in layers for x in log2_shares(record["expert_load"][str(layer)])] for record in loaded]
    clipped = [[max(-MAX_LOG2_SHARE, min(MAX_LOG2_SHARE, value)) for value in column] for column in columns]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 7), height_ratios=(5, 1), layout="constrained")
    image = top.pcolormesh(
        _edges([record["step"] for record in loaded]),
        range(len(layers) * num_experts + 1),
        list(zip(*clipped, strict=True)),
        cmap="RdBu_r",
        vmin=-MAX_LOG2_SHARE,
        vmax=MAX_LOG2_SHARE,
    )
    for band in range(1, len(layers)):
        top.axhline(band * num_experts, color="black", linewidth=1)
    top.set_yticks([(band + 0.5) * num_experts for band in range(len(layers))], [f"layer {layer}" for layer in layers])
    top.invert_yaxis()
    top.margins(x=0)
    top.set_ylabel(f"{num_experts} experts in each layer")
    top.set_title(f"{metrics_jsonl.resolve().parent.name}: tokens of each expert against an even share")
    bar = figure.colorbar(image, ax=top, extend="both", ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "even", "2x", "4x"])
    _plot_violation(bottom, records)
    figure.savefig(out_png, dpi=150)
    plt.close(figure)


def _plot_violation(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    points = [(r["step"], r["max_violation"]) for r in records if r.get("max_violation") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=BLUE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("max violation")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _edges(steps: Sequence[int]) -> list[float]:
    """Borders of the columns whose centres are ``steps``: halfway between neighbours."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(left + right) / 2 for left, right in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise EnvironmentMismatchError(
            "pictures need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def resume_steps(events_jsonl: Path) -> list[int]:
    """Steps after which the run was continued, by its ``resume`` events; empty if it never was, or has no events."""
    if not events_jsonl.is_file():
        return []
    events = [json.loads(line) for line in events_jsonl.read_text().splitlines()]
    return [event["step"] for event in events if event.get("event") == "resume"]


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(words) != 1:
            raise RecipeError("give one run folder: python -m moe_recipes.bench.pictures RUN_DIR")
        run_dir = Path(words[0])
        metrics = run_dir / "metrics.jsonl"
        loss_curve(metrics, run_dir / "loss_curve.png", resumed_at=resume_steps(run_dir / "events.jsonl"))
        print(run_dir / "loss_curve.png")
        if any(record.get("expert_load") for record in read_metrics(metrics)):
            expert_heat_map(metrics, run_dir / "expert_heat_map.png")
            print(run_dir / "expert_heat_map.png")
        else:
            print(f"no expert_load in {metrics}: no heat map", file=sys.stderr)
    except MoeRecipesError as error:
        print(f"moe-recipes: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
