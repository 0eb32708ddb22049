"""How ranks end: all with the cause and the exit code of the one that failed, and a full disk is no bug."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_recipes.config.errors import CorruptCheckpointError, OtherRankError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.runtime.world import together
from tests.ranks.launch import run_on_ranks


def _one_fails(failing: int, error: Exception, exit_code: int) -> None:
    def action() -> int:
        if dist.get_rank() == failing:
            raise error
        return 7

    if dist.get_rank() == failing:
        with pytest.raises(type(error)) as own:
            together(action)
        assert own.value is error
    else:
        with pytest.raises(OtherRankError) as foreign:
            together(action)
        assert (str(foreign.value), foreign.value.exit_code) == (str(error), exit_code)
        assert foreign.value.rank == failing
    assert together(lambda: 7) == 7


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (CorruptCheckpointError("x has changed"), 74),
        (OSError(errno.ENOSPC, "full", "x"), 73),
        (OSError(errno.EACCES, "no", "x"), 70),
        (KeyError("x"), 70),
    ],
)
def test_all_ranks_end_with_the_cause_of_the_one_that_failed(failing: int, error: Exception, exit_code: int) -> None:
    run_on_ranks(_one_fails, 3, failing, error, exit_code)


@pytest.mark.parametrize(("number", "exit_code"), [(errno.ENOSPC, 73), (errno.EROFS, 73), (errno.EPERM, 70)])
def test_a_full_disk_is_73_wherever_it_shows(tmp_path: Path, number: int, exit_code: int) -> None:
    code = f"""
from moe_recipes.train.process import run_rank
def work(run_dir, recipe_json, *, cpu):
    raise OSError({number}, "no more", "metrics.jsonl")
run_rank(work)
"""
    command = [sys.executable, "-c", code, str(tmp_path), "--recipe-json", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    status = json.loads(RunFolder(tmp_path).status.read_text())
    assert done.returncode == status["exit_code"] == exit_code
    assert ("Traceback" in done.stderr) == (exit_code == 70)
    if exit_code == 73:
        assert status["cause"].startswith("metrics.jsonl: cannot be written: no more; free space")
