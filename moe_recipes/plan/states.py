"""Bytes of weights, gradients and optimizer states, by arithmetic. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from moe_recipes.config.recipe import Recipe
from moe_recipes.plan.parameters import ParameterCount

WEIGHT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
"""Bytes a parameter, by dtype; a gradient has as many."""

STATE_BYTES: Mapping[tuple[str, str], float] = {
    ("adamw", "float32"): 12.0,
    ("adamw", "bfloat16"): 6.0,
    ("lean_adamw", "bfloat16"): 6.0625,
    ("flash_adamw", "bfloat16"): 6.125,
}
"""Bytes a parameter that a checkpoint holds, by optimizer and dtype: the weight (4 or 2), AdamW's two moments in the
weight's dtype; the others: 2 for the rest of the float32 master and two 8-bit moments with a scale for a block."""


def checkpoint_bytes(count: ParameterCount, recipe: Recipe) -> int | None:
    """Bytes of one checkpoint; None where the optimizer's are not counted. What the data loader keeps is not in it."""
    state = STATE_BYTES.get((recipe.optim.name, recipe.model.dtype))
    return None if state is None else int(count.trained * state)


def export_bytes(count: ParameterCount, recipe: Recipe) -> int:
    """Bytes of the exported weights. What a family keeps in float32 is counted as the rest."""
    return count.trained * WEIGHT_BYTES[recipe.model.dtype]


def device_bytes(count: ParameterCount, recipe: Recipe) -> int | None:
    """Bytes of weights, gradients and optimizer states on one of the recipe's ranks, where all is shared evenly; None
    where the optimizer's are not counted. Not in it: activations, the layer that is gathered, buffers of NCCL."""
    states = checkpoint_bytes(count, recipe)
    if states is None:
        return None
    return (states + count.trained * WEIGHT_BYTES[recipe.model.dtype]) // recipe.parallel.fsdp_size
