"""Multi-token prediction in ``from_pretrained``: blocks of the checkpoint are loaded, frozen, and saved again.

Transformers leaves them out on load, and so loses them on save. Here they become part of the model as ``models/mtp.py``
builds them. They take no part in ``forward``, ``generate`` or a Trainer's loss, and carry no gradient; the loss that
trains them is this package's trainer's (``train.mtp_loss_coef``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from moe_recipes.config.errors import RecipeError
from moe_recipes.models.mtp import attach_mtp, count_blocks, mtp_of

logger = logging.getLogger("moe_recipes.models")


def _keys(files: Sequence[str] | None, index: dict[str, Any] | None) -> Collection[str] | None:
    """Names of the tensors in a checkpoint's files; None where they cannot be told without loading."""
    if index is not None:
        return index.get("all_checkpoint_keys")
    if not files or len(files) != 1 or not files[0].endswith(".safetensors"):
        return None
    with safe_open(files[0], "pt") as file:
        return set(file.keys())


@contextmanager
def mtp_kept(*, wanted: bool) -> Iterator[None]:
    """While ``from_pretrained`` runs: a model whose checkpoint has blocks of multi-token prediction gets them.

    They must be there before the weights are laid out and read; Transformers has no switch for it, so two of its
    functions are replaced for the duration. Where the blocks cannot be taken, or are not ``wanted``, one warning says
    that the model will be saved without them.
    """
    find, convert = modeling_utils._get_resolved_checkpoint_files, modeling_utils.get_model_conversion_mapping
    found: list[Collection[str] | None] = []

    def found_files(*args: Any, **options: Any) -> Any:
        files, index = find(*args, **options)
        found.append(_keys(files, index))
        return files, index

    def attach_first(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        names = found[-1] if found else None
        if names is not None and mtp_of(model) is None:
            _attach(model, names, wanted=wanted)
        return convert(model, *args, **options)

    modeling_utils._get_resolved_checkpoint_files = found_files
    modeling_utils.get_model_conversion_mapping = attach_first
    try:
        yield
    finally:
        modeling_utils._get_resolved_checkpoint_files = find
        modeling_utils.get_model_conversion_mapping = convert


def _attach(model: PreTrainedModel, names: Collection[str], *, wanted: bool) -> None:
    try:
        num_blocks = count_blocks(model.config.to_dict(), names)
        if not num_blocks:
            return
        quantization = getattr(model.config, "quantization_config", None)
        dequantized = getattr(quantization, "dequantize", False)
        if quantization is not None and not dequantized:
            reason = "the model stays quantised"
        elif not wanted:
            reason = "mtp=False"
        else:
            attach_mtp(model, num_blocks, names)
            return
    except RecipeError as error:
        reason = str(error)
    logger.warning(
        "%s: the checkpoint's layers of multi-token prediction are left out (%s); what save_pretrained writes lacks"
        " them", type(model).__name__, reason,
    )  # fmt: skip


def keep_frozen(model: PreTrainedModel) -> None:
    """Freeze the blocks of a loaded model, and have ``save_pretrained`` write all that their checkpoint holds."""
    mtp = mtp_of(model)
    if mtp is None:
        return
    for layer in mtp.layers():
        layer.requires_grad_(False)
    if mtp.copies:
        model.__class__ = _saves_copies(type(model))
    logger.info(
        "%s: multi-token prediction: %d layers loaded and frozen; save_pretrained writes them",
        type(model).__name__.removeprefix("FSDP"), len(mtp.layers()),
    )  # fmt: skip


@functools.cache
def _saves_copies(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class, whose ``save_pretrained`` also writes the tensors that the blocks repeat; its name stays."""

    class Saving(kind):  # type: ignore[misc, valid-type]
        def gather_sharded_state_dict_for_save(self, *args: Any, **options: Any) -> dict[str, Tensor]:
            """As Transformers' own, which every ``save_pretrained`` calls for the tensors that it writes."""
            state: dict[str, Tensor] = dict(super().gather_sharded_state_dict_for_save(*args, **options))
            mtp = mtp_of(self)
            for copy, source in (mtp.copies if mtp is not None else {}).items():
                if source in state:
                    state[copy] = state[source].clone()  # of tensors that share memory one would be left out
            return state

    Saving.__name__, Saving.__qualname__, Saving.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Saving
