"""Whether a model keeps the documents of a packed row apart.

The only sign of a border is a position id that starts again at 0. Transformers' attention turns that into a mask where
the model hands its position ids to the mask functions; not every model does. Layers that carry a state along the row
(Mamba, linear attention, short convolutions) do not look at position ids at all. For Nemotron-H and GPT-OSS
``models/documents.py`` and ``models/mamba.py`` put classes in place that do both, and say so by an attribute.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from moe_recipes.models.attention import borders_given
from moe_recipes.models.blocks import forward_source

_STATE = re.compile(r"mamba|deltanet|rglru|rwkv|recurrent|linearattention|lightning|shortconv", re.IGNORECASE)


@contextmanager
def borders_found_on_the_host(position_ids_BS: Tensor, device: torch.device) -> Iterator[None]:
    """While a batch runs: Transformers' mask functions get the documents of its rows from here.

    They look for borders on the device and wait for the answer at the start of every forward pass, behind all that
    the device still has to do, such as the last optimizer step. The same function on the batch's CPU tensor gives the
    same answer without the wait.

    Args:
        position_ids_BS: int64, on the CPU.
    """
    find = masking_utils.find_packed_sequence_indices
    documents_BS = find(position_ids_BS)
    on_device = None if documents_BS is None else documents_BS.to(device, non_blocking=True)
    masking_utils.find_packed_sequence_indices = lambda position_ids: on_device
    try:
        with borders_given(documents_BS, device):
            yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def why_not_packed(model: PreTrainedModel) -> str | None:
    """None if documents that share a row never see each other, else the reason in a few words."""
    name, base = type(model).__name__.removeprefix("FSDP"), model.base_model
    hands_on = _keeps_apart(base)
    looking = [module for module in model.modules() if hands_on and module is not base and _keeps_apart(module)]
    safe = {part for module in looking for part in module.modules()}
    for module in model.modules():
        if module in safe:
            continue
        if isinstance(module, nn.Conv1d) or _STATE.search(type(module).__name__):
            kind = type(module).__name__.removeprefix("FSDP")
            return f"{name} carries state from one document of a row to the next ({kind})"
    if hands_on:
        return None
    tree = forward_source(base)
    if tree is None:
        return f"{name} has no source to read, so whether documents stay apart is not known"
    with_positions = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name) and any(_is_key(key) for key in node.value.keys)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _makes_mask(node)]
    if calls and all(_has_positions(call, with_positions) for call in calls):
        return None
    return f"{name} makes its attention mask without position ids, so documents of a row would see each other"


def _keeps_apart(module: nn.Module) -> bool:
    return bool(getattr(type(module), "KEEPS_DOCUMENTS_APART", False))


def _is_key(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value == "position_ids"


def _makes_mask(call: ast.Call) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name == "mask_function" or (name.startswith("create_") and "mask" in name)


def _has_positions(call: ast.Call, with_positions: set[str]) -> bool:
    for keyword in call.keywords:
        if keyword.arg == "position_ids":
            return True
        if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id in with_positions:
            return True
    return False
