"""What a run was made of: versions, code, host, command. Read without importing any of the packages."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moe_recipes

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "tokenizers",
    "datasets",
    "numpy",
    "pyarrow",
    "trl",
    "peft",
    "wandb",
    "flashoptim",
    "transformer-engine",
    "deep-ep",
)


def make_manifest(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The record of one start: plain data for manifest.json. Absent packages are None."""
    return {
        "schema_version": 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "moe_recipes": moe_recipes.__version__,
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_state(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "seed": recipe["train"]["seed"],
        "recipe": recipe,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of this package's code, and whether tracked files differ from it; None if it is not in a repository."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")  # a folder of installed packages may lie in a foreign one
        commit = _git("rev-parse", "HEAD")
        dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(*arguments: str) -> str:
    package = Path(moe_recipes.__file__).parent
    done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
