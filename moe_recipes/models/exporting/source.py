"""The weight files that a model was loaded from, as what an export must be like: their keys, shapes and dtypes.

Only headers are read. Quantised tensors count as the bfloat16 tensors that they stand for:

    FP8     X [R, D] in F8_E4M3, X_scale_inv            X [R, D]
    MXFP4   X_blocks [E, R, D / 32, 16], X_scales       X [E, D, R]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError
from moe_recipes.models.exporting.convert import Converter
from moe_recipes.models.exporting.plan import INDEX_NAME, PlannedTensor, Spec, plan_tensors, saved_tensors, with_dtypes
from moe_recipes.models.loading.files import SINGLE_NAME, open_weights
from moe_recipes.runtime.safetensors_file import DTYPE_NAMES

FP8_SCALE, MXFP4_BLOCKS, MXFP4_SCALES = "_scale_inv", "_blocks", "_scales"
REBUILT = r"rotary_emb\.inv_freq$"
"""Old checkpoints hold it; it follows from the config."""


@dataclass(frozen=True, kw_only=True)
class SourceTensors:
    """What the weight files of a folder hold, dequantised. ``specs`` is empty where there are none."""

    specs: dict[str, Spec]
    """Disk key -> dtype and shape."""

    quantised: dict[str, int]
    """``fp8`` or ``mxfp4`` -> number of tensors."""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: dtype for key, (dtype, _) in self.specs.items()}


def read_source_tensors(folder: Path) -> SourceTensors:
    """Keys, shapes and dtypes of a model folder.

    Raises:
        MissingInputError, CorruptCheckpointError: the folder or one of its files is not there or damaged.
    """
    if not folder.is_dir():
        raise MissingInputError(f"export: {folder} is not a folder; give the folder that the model was loaded from")
    if not any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return SourceTensors(specs={}, quantised={})
    with open_weights(folder) as files:
        places = {key: files.place(key) for key in files.weight_map}
    return dequantised({key: (place.dtype, place.shape) for key, place in places.items()})


def dequantised(stored: Mapping[str, Spec]) -> SourceTensors:
    """The tensors that stored ones stand for."""
    specs: dict[str, Spec] = {}
    quantised = {"fp8": 0, "mxfp4": 0}
    for key, (dtype, shape) in stored.items():
        if key.endswith(FP8_SCALE) and key.removesuffix(FP8_SCALE) in stored:
            continue
        base = key.removesuffix(MXFP4_BLOCKS)
        if key.endswith(MXFP4_SCALES) and f"{key.removesuffix(MXFP4_SCALES)}{MXFP4_BLOCKS}" in stored:
            continue
        if base != key and f"{base}{MXFP4_SCALES}" in stored and len(shape) == 4:
            experts, rows, groups, pairs = shape
            specs[base] = torch.bfloat16, (experts, groups * pairs * 2, rows)
            quantised["mxfp4"] += 1
        elif f"{key}{FP8_SCALE}" in stored:
            specs[key] = torch.bfloat16, shape
            quantised["fp8"] += 1
        else:
            specs[key] = dtype, shape
    return SourceTensors(specs=specs, quantised={kind: count for kind, count in quantised.items() if count})


def check_like_source(model: PreTrainedModel, folder: Path) -> None:
    """Whether an export of the model could have the source's keys and shapes, asked before it is trained.

    Seconds for a model of 50,000 tensors; moves no weight and talks to no rank.

    Raises:
        CorruptCheckpointError, MissingInputError, RecipeError: as the export would.
    """
    source = read_source_tensors(folder)
    if source.specs:
        planned = plan_tensors(saved_tensors(model), Converter(model), model)
        left_out_by_design(source, with_dtypes(planned, source.dtypes), model)


def left_out_by_design(source: SourceTensors, tensors: list[PlannedTensor], model: PreTrainedModel) -> list[str]:
    """Keys of the source that the model does not hold, after checking that all else is as in the source.

    By design are what the family ignores when it is loaded, copies of a tied weight, and what the config implies; a
    tensor that the family may miss when it is loaded may be there beyond the source's.

    Args:
        tensors: planned with the source's dtypes.
    Raises:
        CorruptCheckpointError: a key too many or too few, another shape, or a dtype that no weights are trained in.
            It names the first.
    """
    want = {key: spec for tensor in tensors for key, spec in tensor.disk.items()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), REBUILT]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    absent = sorted(source.specs.keys() - want.keys())
    by_design = [key for key in absent if key in tied or any(re.search(pattern, key) for pattern in ignored)]
    problems = [f"{key} is in the source and not in the model" for key in sorted({*absent} - {*by_design})]
    optional = model._keys_to_ignore_on_load_missing or ()
    for key, spec in want.items():
        if key not in source.specs and any(re.search(pattern, key) for pattern in optional):
            continue
        if key not in source.specs:
            problems.append(f"{key} is in the model and not in the source")
        elif source.specs[key] != spec:
            problems.append(f"{key} is {_said(source.specs[key])} in the source and {_said(spec)} in the model")
    if problems:
        raise CorruptCheckpointError(
            f"the export would not be like its source: {problems[0]} ({len(problems)} such tensors);"
            " use a source folder whose weights and config.json belong together"
        )
    return by_design


def _said(spec: Spec) -> str:
    return f"{DTYPE_NAMES[spec[0]]} {list(spec[1])}"
