"""Run a function on several gloo ranks of this machine, and bring the first failure back."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_recipes.config.errors import EXIT_INFRASTRUCTURE, MoeRecipesError, exit_code_of, first_line

TIMEOUT_S = 240


class RanksFailedError(AssertionError):
    """A rank raised, or did not end in time. The text has the rank's traceback."""

    def __init__(self, text: str, *, cause: str, exit_code: int) -> None:
        super().__init__(text)
        self.cause = cause
        """What the rank raised, in one line."""

        self.exit_code = exit_code


def _rank_main(rank: int, num_ranks: int, folder: str, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
        fn(*args)
        dist.barrier()
    except BaseException as error:
        kind = "" if isinstance(error, MoeRecipesError) else f"{type(error).__name__}: "
        said = {
            "rank": rank,
            "cause": f"{kind}{first_line(error)}",
            "exit_code": exit_code_of(error),
            "traceback": traceback.format_exc(),
        }
        Path(folder, f"error-{time.time():.6f}-{rank}").write_text(json.dumps(said))
        os._exit(1)
    os._exit(0)


def run_on_ranks(fn: Callable[..., None], num_ranks: int, *args: Any) -> None:
    """Call ``fn(*args)`` on every rank of a fresh gloo group; the ranks are forks, with one thread each.

    A process that has computed with torch has threads that a fork lacks: call this from one that has only imported it.

    Raises:
        RanksFailedError: a rank failed or did not end in ``TIMEOUT_S``; carries the first rank's traceback.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, num_ranks, folder, fn, args)) for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        failed = False
        for process in ranks:
            process.join(TIMEOUT_S if not failed else 5)
            if process.exitcode != 0:
                failed = True
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
        if failed:
            first = min(Path(folder).glob("error-*"), default=None)
            if first is None:
                text = f"a rank of {num_ranks} hung or died without a word"
                raise RanksFailedError(text, cause=text, exit_code=EXIT_INFRASTRUCTURE)
            said = json.loads(first.read_text())
            text = f"rank {said['rank']} of {num_ranks} failed:\n{said['traceback']}"
            raise RanksFailedError(text, cause=said["cause"], exit_code=said["exit_code"])
