"""Warnings of the drop-in for what a recipe refuses: code and pickles of a model, which run on this machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache

from moe_recipes.models.exporting.plan import INDEX_NAME
from moe_recipes.models.loading.files import PICKLES, SINGLE_NAME

logger = logging.getLogger("moe_recipes.models")


def warn_of_code(source: Any, options: Mapping[str, Any]) -> None:
    """Say once a load that code or pickled weights come from where they may change; Transformers gets the call as it
    is.

    Args:
        source: first argument of ``from_pretrained``, after it has returned: what it needs is in the cache by now.
        options: its keywords.
    """
    if not isinstance(source, str | os.PathLike) or (dist.is_initialized() and dist.get_rank() != 0):
        return
    folder = Path(source)
    if options.get("trust_remote_code") and not folder.is_dir():
        revision = str(options.get("code_revision") or options.get("revision") or "")
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            logger.warning(
                "%s: trust_remote_code runs whatever code the repository holds today; pin revision to a commit of 40"
                " hex digits",
                source,
            )
    if not options.get("state_dict") and _is_pickled(folder, str(source), options):
        logger.warning(
            "%s: its weights are pickled, which can run any code when they are read; take a safetensors revision",
            source,
        )


def _is_pickled(folder: Path, source: str, options: Mapping[str, Any]) -> bool:
    """Whether pickles were what there was to read."""

    def has(name: str) -> bool:
        if folder.is_dir():
            return (folder / str(options.get("subfolder") or "") / name).exists()
        where = {"cache_dir": options.get("cache_dir"), "revision": options.get("revision")}
        try:
            return isinstance(try_to_load_from_cache(source, name, **where), str)
        except ValueError:  # no id of a repository
            return False

    if not any(has(name) for name in PICKLES):
        return False
    return options.get("use_safetensors") is False or not any(has(name) for name in (SINGLE_NAME, INDEX_NAME))
