"""The copy of the metrics that goes to W&B. It can be late, offline or broken; it can never stop or slow a run."""

from __future__ import annotations

import logging
import os
import queue
import threading
import uuid
from pathlib import Path
from typing import Any

logger = logging.getLogger("moe_recipes")
CLOSE_TIMEOUT_S = 20.0


class WandbLog:
    """Hands records to a thread that owns W&B. Rank 0 only.

    The run id is made once and kept in ``RUN/wandb_id``, so all attempts of a run are one W&B run. Without a key the
    log is written offline under ``RUN/wandb``; ``wandb sync`` sends it later.
    """

    def __init__(self, run_dir: Path, *, mode: str, project: str, name: str, config: dict[str, Any]) -> None:
        self.records: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        if mode == "off":
            return
        settings = {"project": project, "name": name, "dir": str(run_dir), "config": config, "resume": "allow"}
        self.thread = threading.Thread(target=self._run, args=(run_dir, mode, settings), name="wandb", daemon=True)
        self.thread.start()

    def _run(self, run_dir: Path, mode: str, settings: dict[str, Any]) -> None:
        try:
            import wandb

            id_file = run_dir / "wandb_id"
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:12])
            # A container's user may have no home: then the path stays relative, and there is no such file.
            has_key = bool(os.environ.get("WANDB_API_KEY")) or os.path.exists(os.path.expanduser("~/.netrc"))
            online = mode == "auto" and has_key
            run = wandb.init(
                **settings,
                id=id_file.read_text(),
                mode="online" if online else "offline",
                settings=wandb.Settings(silent=True),
            )
            while (item := self.records.get()) is not None:
                step, record = item
                run.log(record, step=step)
            run.finish()
        except ImportError:
            logger.info("wandb is not installed; metrics.jsonl has everything")
        except Exception as error:  # whatever W&B does, training goes on
            logger.warning("wandb stopped (%s); metrics.jsonl has everything", error)

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Queue one record of metrics.jsonl. Costs no waiting."""
        if self.thread is not None and self.thread.is_alive():
            self.records.put((step, flat_numbers(record)))

    def close(self) -> None:
        """Wait a bounded time for the rest to be written."""
        if self.thread is not None:
            self.records.put(None)
            self.thread.join(CLOSE_TIMEOUT_S)
            if self.thread.is_alive():
                logger.warning("wandb did not finish in %.0f s; metrics.jsonl has everything", CLOSE_TIMEOUT_S)


def flat_numbers(record: dict[str, Any]) -> dict[str, int | float]:
    """The record's numbers by flat names: an expert's tokens become ``expert_load/layer_03/expert_017``, a layer's
    number ``max_violation/layer_03``."""
    flat = {key: value for key, value in record.items() if isinstance(value, int | float)}
    for name in ("max_violation", "dead_experts"):
        for layer, value in record.get(f"{name}_of_layer", {}).items():
            flat[f"{name}/layer_{int(layer):02d}"] = value
    for layer, counts in record.get("expert_load", {}).items():
        for expert, count in enumerate(counts):
            flat[f"expert_load/layer_{int(layer):02d}/expert_{expert:03d}"] = count
    return flat
