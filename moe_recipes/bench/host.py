"""What this host is made of."""

from __future__ import annotations

import os
import subprocess


def gpus() -> list[str]:
    """``name, driver, memory`` of every GPU of this host, by nvidia-smi; empty without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES tells a child which GPU to take: those that this process may use."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [word for word in asked.split(",") if word] if asked is not None else [str(n) for n in range(len(gpus()))]
