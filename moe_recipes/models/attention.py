"""Attention that is fused in every case of training, under Transformers' attention interface by the name
``moe_recipes``.

Transformers' choices without flash-attn's package: ``sdpa`` computes packed rows and windows over the whole square,
from a mask of S x S, and does not take sinks, so that GPT-OSS falls to ``eager``, which keeps every score. This one
needs no mask: documents come from the position ids, which the layers hand on, the window and the sinks from the layer.
It stands aside, for ``sdpa`` or for scores in memory, where a mask is needed after all: padding, a cache, dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_recipes.families import FAMILIES, family_of
from moe_recipes.kernels.attention import Mask, allowed, attention, attention_reference, supports
from moe_recipes.runtime.optimizations import Optimization

NAME = "moe_recipes"
_BORDERS = "_moe_recipes_borders"
_on_the_host: list[Tensor | None] = []
"""While a batch of known documents runs: its borders, as ``Mask`` has them."""


def borders_of(document_BS: Tensor) -> Tensor:
    """Where documents start in rows laid one after another, and the number of tokens: int32 ``[documents + 1]``.

    On a GPU this waits for the device.

    Args:
        document_BS: integers that change where a document ends.
    """
    starts_BS = torch.ones_like(document_BS, dtype=torch.bool)
    starts_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([document_BS.numel()])]).to(torch.int32)


@contextmanager
def borders_given(document_BS: Tensor | None, device: torch.device) -> Iterator[None]:
    """While a batch runs: its documents, known on the host, so that no layer has to wait for the device.

    Args:
        document_BS: on the CPU; None where every row is one document.
    """
    borders = None if document_BS is None else borders_of(document_BS)
    if borders is not None and device.type == "cuda":
        borders = borders.pin_memory().to(device, non_blocking=True)
    _on_the_host.append(borders)
    try:
        yield
    finally:
        _on_the_host.pop()


def _borders(position_ids: Tensor | None, rows: int) -> Tensor | None:
    """The documents of a batch by its position ids. Found once: layers are handed the same tensor, and it keeps them
    for layers that are computed again in the backward pass. Written anew in place, or taken for another number of rows,
    it is another batch's; a tensor of inference mode does not tell, so that every layer looks for itself."""
    if position_ids is None:
        return None
    state = None if position_ids.is_inference() else (rows, position_ids._version)
    kept: tuple[Any, Tensor | None] | None = getattr(position_ids, _BORDERS, None)
    if kept is not None and state is not None and kept[0] == state:
        return kept[1]
    if _on_the_host:
        borders = _on_the_host[-1]
    else:
        documents = masking_utils.find_packed_sequence_indices(position_ids.expand(rows, -1))
        borders = None if documents is None else borders_of(documents)
    setattr(position_ids, _BORDERS, (state, borders))
    return borders


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:  # fmt: skip
    """The mask that the layers get: none where position ids and the layer say all, else that of ``sdpa``."""
    if attention_mask is None and q_length == kv_length and not use_vmap:
        return None
    options = {**options, "attention_mask": attention_mask, "use_vmap": use_vmap}
    return masking_utils.sdpa_mask(batch_size, q_length, kv_length, **options)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``attention`` under the signature of Transformers' ``AttentionInterface``.

    Args:
        query, key, value: ``[B, H or G, S, C or V]``.
    Returns:
        ``[B, S, H, V]``, and no scores.
    """
    rows, length = query.shape[0], query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and causal and length == key.shape[2]
    mask = Mask(scale=scale, window=sliding_window, borders=_borders(position_ids, rows) if whole else None)
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if whole and not dropout and not torch.compiler.is_compiling() and supports(query, value):
        return attention(*tensors, mask=mask, sinks_H=s_aux), None
    if whole and (mask.window is not None or mask.borders is not None or s_aux is not None):
        attention_mask = allowed(mask, rows=rows, length=length, device=query.device)
    if s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, is_causal=is_causal, **kwargs
        )
    if dropout:
        raise ValueError("attn_implementation moe_recipes has no attention dropout with sinks; set it to 0, or eager")
    return attention_reference(*tensors, s_aux, attention_mask, scale=scale).contiguous(), None


def choose_attention(config: PreTrainedConfig, name: str | None) -> str | None:
    """The implementation that a caller's choice means for a model of this config.

    GPT-OSS has no ``sdpa`` in Transformers; asked for it or for nothing it gets this one instead of ``eager``.

    Raises:
        ValueError: this attention for a family whose layers are not known to hand on the position ids.
    """
    family = family_of(config.get_text_config().model_type)
    if name == NAME and family is None:
        known = ", ".join(sorted(known.name for known in FAMILIES))
        raise ValueError(f"attn_implementation {NAME} knows {known}, and not {config.model_type!r}")
    return NAME if family is not None and not family.sdpa and name in (None, "sdpa") else name


def report_attention(model: PreTrainedModel) -> Optimization:
    """What to say of the model's attention."""
    used = model.config.get_text_config()._attn_implementation
    if used != NAME:
        return Optimization("fused attention with documents", False, f"attn_implementation is {used!r}")
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return Optimization("fused attention with documents", on_gpu, NAME if on_gpu else "the model is not on a GPU")


AttentionInterface.register(NAME, attention_forward)
masking_utils.AttentionMaskInterface.register(NAME, attention_mask)
