"""Work that needs packages which an operator's command must not import: done by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from moe_recipes.config.errors import EXIT_INTERNAL, EXIT_OK, MoeRecipesError
from moe_recipes.launch.words import ERROR_PREFIX


def run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run ``python -m module`` and return what it printed.

    Args:
        environment: variables on top of this process's own.
    Raises:
        MoeRecipesError: with the exit code of a process that failed, and its last error line.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != EXIT_OK:
        lines = done.stderr.strip().splitlines() or [f"{module} failed without a word"]
        ours = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
        error = MoeRecipesError((ours or lines)[-1])
        error.exit_code = done.returncode if done.returncode > 0 else EXIT_INTERNAL
        raise error
    return done.stdout
