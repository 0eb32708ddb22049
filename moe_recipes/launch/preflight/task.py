"""One task of a preflight: ``python -m moe_recipes.launch.preflight.task FOLDER [--outside]``.

The first task of a node asks and writes a record. Inside the container every task then becomes the torch probes of its
rank. The exit code is 0 also where a probe failed: the batch host judges, and srun ends all tasks for one that fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_recipes.config.errors import EXIT_OK, MoeRecipesError
from moe_recipes.config.run_folder import write_json
from moe_recipes.launch.preflight.node import ask
from moe_recipes.launch.preflight.plan import node_name, read_plan, record_path
from moe_recipes.launch.words import ERROR_PREFIX


def task_place(environ: Mapping[str, str]) -> tuple[int, int]:
    """``(rank, local rank)`` of this task; one process alone is the first."""
    rank = environ.get("RANK", environ.get("SLURM_PROCID", "0"))
    return int(rank), int(environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, write, and become the torch probes where there is torch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outside", action="store_true")
    options = parser.parse_args(arguments)
    try:
        plan = read_plan(options.folder)
        rank, local_rank = task_place(os.environ)
        if local_rank == 0:
            kind = "outside" if options.outside else "probe"
            record = ask("outside" if options.outside else "inside", plan, rank=rank, node=node_name())
            write_json(record_path(options.folder, kind, rank), record)
    except MoeRecipesError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return error.exit_code
    if not options.outside and importlib.util.find_spec("torch") is not None:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-u", "-m", "moe_recipes.runtime.preflight", str(options.folder)])
    return EXIT_OK


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a probe that hangs in a file system has left its thread behind
