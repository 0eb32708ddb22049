"""Send a run's steps to W&B from metrics.jsonl, also while it trains: ``python -m moe_recipes.train.wandb_replay RUN``.

Not ``wandb sync``: for a run that resumes it adds all rows again each time that it is called. Here W&B says which step
it has, and only later ones are sent. Nothing in the run folder is written. The machine's own readings, which W&B keeps
in its offline folder, are not sent.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import (
    EXIT_OK,
    EnvironmentMismatchError,
    InfrastructureError,
    MissingInputError,
    MoeRecipesError,
    SecretsError,
    first_line,
)
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.launch.words import ERROR_PREFIX
from moe_recipes.train.wandb_log import flat_numbers

INIT_TIMEOUT_S = 30


def replay(folder: RunFolder) -> dict[str, Any]:
    """Send every step that W&B does not have yet.

    Returns:
        ``url``, ``rows`` sent now, and ``step``, the newest that W&B has then (None before the first).
    Raises:
        MissingInputError: the run has no W&B id, or no step.
        EnvironmentMismatchError: wandb is not installed.
        SecretsError: there is no key, or the server refuses it.
        InfrastructureError: the server does not answer as it should.
    """
    try:
        import wandb
    except ImportError as error:
        raise EnvironmentMismatchError(
            f"{sys.executable} has no wandb; run: {sys.executable} -m pip install wandb"
        ) from error
    recipe, records = folder.read_recipe(), read_records(folder.metrics)
    if not records:
        raise MissingInputError(f"{folder.metrics}: holds no step yet; try again after the first")
    manifest = json.loads(folder.manifest.read_bytes()) if folder.manifest.exists() else {}
    with tempfile.TemporaryDirectory(prefix="moe-recipes-wandb-") as scratch:
        try:
            run = wandb.init(**init_arguments(folder, recipe, manifest), dir=scratch)
        except wandb.errors.UsageError as error:
            raise SecretsError(f"W&B: {first_line(error)}; put WANDB_API_KEY into the file of secrets") from error
        except wandb.errors.Error as error:
            if any(code in str(error) for code in ("401", "403")):
                raise SecretsError(f"W&B refuses the key: {first_line(error)}; renew WANDB_API_KEY") from error
            raise InfrastructureError(f"W&B: {first_line(error)}; try again later") from error
        first = run.starting_step
        rows = [record for record in records if record["step"] >= first]
        for record in rows:
            run.log(flat_numbers(record), step=record["step"])
        url = run.url
        run.finish()
    return {"url": url, "rows": len(rows), "step": max(records[-1]["step"], first - 1)}


def init_arguments(folder: RunFolder, recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """What makes this the same W&B run as the trainer's own."""
    import wandb

    try:
        run_id = (folder.path / "wandb_id").read_text().strip()
    except OSError as error:
        raise MissingInputError(
            f"{folder.path}: has no W&B run (log.wandb is off, or wandb is not installed there); nothing to send"
        ) from error
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=INIT_TIMEOUT_S)
    return {
        "project": recipe.log.wandb_project,
        "name": recipe.name,
        "id": run_id,
        "resume": "allow",
        "mode": "online",
        "config": {
            "device": manifest.get("device"),
            "flops_per_token": manifest.get("mfu", {}).get("flops_per_token"),
        },
        "settings": settings,
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the trainer may be writing the last one."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def main(run_dir: str) -> int:
    """Replay and print what was sent as JSON. Returns the exit code; an error is one line on stderr."""
    logging.getLogger("wandb").setLevel(logging.ERROR)
    try:
        print(json.dumps(replay(RunFolder(run_dir))))
    except MoeRecipesError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
