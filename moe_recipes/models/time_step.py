"""The limits of Mamba's time step.

Transformers' Nemotron-H clamps the time step from below at ``time_step_min``, which is meant for the initial values of
``dt_bias``, and does not look at the config's ``time_step_limit``. Trained models use steps below it.
"""

from __future__ import annotations

from torch import nn

from moe_recipes.runtime.optimizations import Optimization


def honour_time_step_limit(model: nn.Module) -> Optimization | None:
    """Give every Mamba layer the limits of its config, on any device.

    Returns:
        What to report; None where Transformers has the same limits, or the model no such layers.
    """
    changed = 0
    for module in model.modules():
        wanted = getattr(getattr(module, "config", None), "time_step_limit", None)
        if wanted is None or not hasattr(module, "time_step_limit"):
            continue
        limit = tuple(float(value) for value in wanted)
        if tuple(module.time_step_limit) != limit:  # type: ignore[arg-type]
            module.time_step_limit = limit  # type: ignore[assignment]
            changed += 1
    return Optimization("time-step limit of the config", True, f"{changed} Mamba layers") if changed else None
