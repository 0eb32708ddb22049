"""One rank of a shakedown dies here, without a word, as a rank dies whose host or GPU fails."""

from __future__ import annotations

import os
import signal
import time

from moe_recipes.config.errors import RecipeError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.shakedown import KILL_EVENT, KILL_VARIABLE

PATIENCE_S = 60.0
"""How long rank 0 may take to say that the step is durable; a network file system shows it late."""


def dies_on_request() -> bool:
    """A rank of this run may be asked to die; then a save is waited for, as it must be durable first."""
    return KILL_VARIABLE in os.environ


def die_if_asked(folder: RunFolder, *, rank: int, step: int) -> None:
    """Called when ``step`` has been saved: kill this process if ``MOE_SHAKEDOWN_KILL`` names its rank.

    Raises:
        RecipeError: the variable is not ``RANK:STEP``.
    """
    asked = os.environ.get(KILL_VARIABLE)
    if asked is None:
        return
    chosen, _, first_step = asked.partition(":")
    if not (chosen.isdigit() and first_step.isdigit()):
        raise RecipeError(f"{KILL_VARIABLE}={asked!r} must be RANK:STEP; unset it for a real run")
    if int(chosen) != rank or step < int(first_step):
        return
    deadline = time.monotonic() + PATIENCE_S
    while (folder.read_status() or {}).get("last_durable_step") != step and time.monotonic() < deadline:
        time.sleep(0.05)
    folder.append_event(KILL_EVENT, step=step, rank=rank)
    os.kill(os.getpid(), signal.SIGKILL)
