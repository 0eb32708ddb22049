"""Run a function on several gloo ranks of this machine, and bring the first failure back to pytest."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 240


def _rank_main(rank: int, num_ranks: int, folder: str, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
        fn(*args)
        dist.barrier()
    except BaseException:
        with open(os.path.join(folder, f"error-{time.time():.6f}-{rank}"), "w") as file:
            file.write(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def run_on_ranks(fn: Callable[..., None], num_ranks: int, *args: Any) -> None:
    """Call ``fn(*args)`` on every rank of a fresh gloo group; the ranks are forks, with one thread each.

    Raises:
        AssertionError: a rank failed or did not end in time; carries the first rank's traceback.
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
            first = min((name for name in os.listdir(folder) if name.startswith("error-")), default=None)
            if first is None:
                raise AssertionError(f"a rank of {num_ranks} hung or died without a word")
            with open(os.path.join(folder, first)) as file:
                raise AssertionError(f"rank {first.rpartition('-')[2]} of {num_ranks} failed:\n{file.read()}")
