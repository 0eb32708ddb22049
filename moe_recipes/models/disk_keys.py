"""Checkpoint files read by ``load_state_dict``: their expert tensors are put together on the way in.

``save_pretrained`` writes one tensor an expert, and only ``from_pretrained`` puts them together again. The Trainer of
Transformers resumes a checkpoint, and loads a run's best model, by ``load_state_dict(strict=False)``: every expert is
then a missing key, training goes on with other experts, and a warning is all that says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def accept_disk_keys(model: PreTrainedModel) -> None:
    """Let ``model.load_state_dict`` take a checkpoint, or a file of one, with the keys of ``save_pretrained``."""
    model.register_load_state_dict_pre_hook(_convert)


def _convert(model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace disk keys by model keys, in place. What is missing or unknown stays so and is torch's to report.

    Costs a second copy of the weights on the host while it runs.

    Raises:
        RuntimeError: some experts of a layer are there and some are not.
    """
    own = model.state_dict()
    if prefix or not own.keys() - state_dict.keys() or not state_dict.keys() - own.keys():
        return
    if getattr(model, "is_quantized", False) or any(isinstance(tensor, DTensor) for tensor in own.values()):
        return
    with torch.random.fork_rng(devices=[]):  # missing weights are drawn, and then left out
        source, info = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(state_dict), dtype=model.dtype, output_loading_info=True
        )
    unknown = {name: state_dict[name] for name in info["unexpected_keys"] if name in state_dict}
    state_dict.clear()
    state_dict.update(unknown)
    state_dict.update(
        (name, tensor) for name, tensor in source.state_dict().items() if name not in info["missing_keys"]
    )
