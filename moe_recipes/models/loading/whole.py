"""Transformers' own loader, for the families whose conversion makes several tensors of a model out of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_recipes.config.errors import CorruptCheckpointError
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.exporting.convert import gather_objects


def from_pretrained_whole(folder: Path, *, num_ranks: int, **options: Any) -> PreTrainedModel:
    """``from_pretrained``, but a weight that the folder lacks is an error: Transformers warns, and draws it at random.

    Raises:
        CorruptCheckpointError: the same on all ranks, though a rank that does not hold an expert may miss nothing.
    """
    model, problem = None, None
    try:
        # Other shapes pass here, to be named below: the error of Transformers does not say which tensor it means.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **options
        )
        problem = _weights_problem(info)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        problem = "experts of one layer that do not fit together (the log names them)"
    problems = [found for found in gather_objects(problem, num_ranks) if found]
    if problems or model is None:
        raise CorruptCheckpointError(
            f"{folder}: {problems[0]}; fetch the model again, or the config.json that belongs to its weights"
        )
    return model


def _weights_problem(info: Mapping[str, Any]) -> str | None:
    """What the loading report has against the weights, in a few words; tensors that the model lacks are no problem."""
    if info["mismatched_keys"]:
        names = sorted(str(key[0]) for key in info["mismatched_keys"])  # the shapes beside them are those of shards
        return f"{names[0]} has another shape than in the model ({len(names)} such tensors)"
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        return f"no weights for {names[0]} ({len(names)} tensors of the model are missing)"
    return None
