"""Base models that hand the documents of a packed row on to layers and masks that Transformers leaves without them.

Nemotron-H makes its attention mask from the position ids, but its Mamba layers never see them. GPT-OSS makes both of
its masks without them. A row with borders needs no cache, and with one Transformers does not look for borders at all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import masking_utils
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron_h
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from moe_recipes.families import FAMILIES
from moe_recipes.models.blocks import fingerprint, modules_of_class, put_class
from moe_recipes.runtime.optimizations import Optimization

NAME = "documents of a row kept apart"
REPLACED = {"NemotronHModel": "98dffc4402b0e5c1", "GptOssModel": "7970666273030088"}
"""Fingerprints of what the forwards below call and rely on."""


def found_sources() -> dict[str, str]:
    """Fingerprints of the same functions in the installed Transformers."""
    return {
        "NemotronHModel": fingerprint(nemotron_h.NemotronHModel.forward, nemotron_h.NemotronHBlock.forward),
        "GptOssModel": fingerprint(gpt_oss.GptOssModel.forward),
    }


class NemotronHModel(nemotron_h.NemotronHModel):
    """Transformers' class; its Mamba layers get ``seq_idx``, made once of the position ids."""

    KEEPS_DOCUMENTS_APART = True
    _can_set_experts_implementation_cached_value = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: names on disk are Transformers'."""
        return False

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As Transformers' own; without a cache where a row has borders, and in training unless one is asked for."""
        if cache is None and position_ids is not None and kwargs.get("seq_idx") is None:
            kwargs["seq_idx"] = masking_utils.find_packed_sequence_indices(position_ids)
        if kwargs.get("seq_idx") is None:
            kwargs.pop("seq_idx", None)
        if cache is None and ("seq_idx" in kwargs or (self.training and use_cache is None)):
            use_cache = False
        return super().forward(
            input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, cache=cache,
            use_cache=use_cache, attention_mask=attention_mask, **kwargs,
        )  # fmt: skip


class GptOssModel(gpt_oss.GptOssModel):
    """Transformers' class; its masks are made with the position ids."""

    KEEPS_DOCUMENTS_APART = True
    _can_set_experts_implementation_cached_value = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: names on disk are Transformers'."""
        return False

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Transformers' own; without a cache where a row has borders."""
        packed = cache is None and attention_mask is None and position_ids is not None
        if packed and masking_utils.find_packed_sequence_indices(position_ids) is not None:
            use_cache = False
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            options = {
                "config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": None, "cache": None,
                "position_ids": position_ids,
            }  # fmt: skip
            attention_mask = {
                "full_attention": masking_utils.create_causal_mask(**options),
                "sliding_attention": masking_utils.create_sliding_window_causal_mask(**options),
            }
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip


_CLASSES = {
    "nemotron_h": (NemotronHModel, nemotron_h.NemotronHModel),
    "gpt_oss": (GptOssModel, gpt_oss.GptOssModel),
}
"""Ours and Transformers' for each family whose documents its own class does not keep apart."""


def pass_documents(model: nn.Module) -> Optimization | None:
    """Give the base model of a family that needs it the forward above; None for the other families."""
    sources = found_sources()
    for ours, theirs in (_CLASSES[family.name] for family in FAMILIES if family.documents == "replaced"):
        found = modules_of_class(model, theirs)
        if not found:
            continue
        if sources[theirs.__name__] != REPLACED[theirs.__name__]:
            return Optimization(NAME, False, f"Transformers' {theirs.__name__} is not the one that it builds on")
        for module in found:
            put_class(module, ours)
            # By class: without it the model would hand out no router logits, which the router losses read.
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
        return Optimization(NAME, True, f"{theirs.__name__} gets the borders from the position ids")
    return None
