"""What every rank process shares: its arguments, its log, and how it ends."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from moe_recipes.config.errors import (
    EXIT_CANNOT_WRITE,
    EXIT_INTERNAL,
    EXIT_OK,
    CannotWriteError,
    DoesNotFitError,
    MoeRecipesError,
    StoppedError,
    exit_code_of,
)
from moe_recipes.config.run_folder import RunFolder

logger = logging.getLogger("moe_recipes")


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def _leave_cause(folder: RunFolder | None, error: Exception, exit_code: int) -> None:
    """Leave the cause in status.json, unless another rank of this attempt was first."""
    if folder is None:
        return
    stopped = isinstance(error, StoppedError)
    status = folder.read_status() or {}
    if not folder.path.is_dir() or status.get("state") in ("failed", "stopped") or (stopped and _rank() != 0):
        return
    try:
        folder.write_status(
            "stopped" if stopped else "failed",
            cause=str(error) or type(error).__name__,
            rank=getattr(error, "rank", _rank()),
            host=socket.gethostname(),
            exit_code=exit_code,
        )
    except MoeRecipesError as unwritable:
        logger.error("moe-recipes: %s", unwritable)


def _out_of_memory(error: torch.OutOfMemoryError) -> DoesNotFitError:
    first = str(error).split(". ")[0]
    return DoesNotFitError(
        f"out of device memory: {first}; lower train.micro_batch_size or data.seq_len, set"
        f" train.activation_checkpointing=full, or shard over more ranks"
    )


def _guarded(work: Callable[..., None], arguments: argparse.Namespace, *, uses_status: bool) -> int:
    folder = RunFolder(arguments.run_dir) if uses_status else None
    try:
        work(arguments.run_dir, arguments.recipe_json, cpu=arguments.cpu)
        return EXIT_OK
    except torch.OutOfMemoryError as error:
        known: MoeRecipesError = _out_of_memory(error)
    except MoeRecipesError as error:
        known = error
    except Exception as error:
        if not (isinstance(error, OSError) and exit_code_of(error) == EXIT_CANNOT_WRITE):
            traceback.print_exc()
            _leave_cause(folder, error, EXIT_INTERNAL)
            return EXIT_INTERNAL
        place = error.filename or arguments.run_dir
        known = CannotWriteError(f"{place}: cannot be written: {error.strerror}; free space, or set another run_dir")
    logger.error("moe-recipes: %s", known)
    _leave_cause(folder, known, known.exit_code)
    return known.exit_code


def run_rank(work: Callable[..., None], *, uses_status: bool = True) -> NoReturn:
    """Run ``work(run_dir, recipe_json, cpu=...)`` as this rank and end the process with the exit code that fits.

    Only rank 0 logs below warnings.

    Args:
        uses_status: the cause of a failure goes to ``RUN/status.json``, which is about the training alone.
    """
    # Asked by the host side when nothing moves: every thread's stack into this rank's log. Works in a stuck collective.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--recipe-json", required=True)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger().setLevel(logging.WARNING)
    logger.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)
    logging.getLogger("moe_recipes.models").setLevel(logging.WARNING)  # the trainer's own line says it all
    code = _guarded(work, arguments, uses_status=uses_status)
    if code == EXIT_OK and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a failed rank must not wait in exit handlers for peers that are stuck in a collective
