"""Model families as data: what differs between them, read by plan, models and prove alike. No torch.

A family with an expert-parallel plan in Transformers needs no declaration to be trained; what is declared here is what
its config.json does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_recipes.families.deepseek_v3 import DEEPSEEK_V3
from moe_recipes.families.family import (
    CORRECTION_BIAS,
    EXPERT_COUNT_KEYS,
    PROOF_TOLERANCE,
    Experts,
    Family,
    Mtp,
    Published,
    Router,
)
from moe_recipes.families.gpt_oss import GPT_OSS
from moe_recipes.families.nemotron_h import NEMOTRON_H
from moe_recipes.families.qwen3_moe import QWEN3_MOE

__all__ = [
    "CORRECTION_BIAS", "DEEPSEEK_V3", "EXPERT_COUNT_KEYS", "FAMILIES", "GPT_OSS", "NEMOTRON_H", "PROOF_TOLERANCE",
    "PUBLISHED", "QWEN3_MOE", "Experts", "Family", "Mtp", "Published", "Router", "family_of",
]  # fmt: skip

FAMILIES = (QWEN3_MOE, NEMOTRON_H, GPT_OSS, DEEPSEEK_V3)
PUBLISHED = {model.source: model for family in FAMILIES for model in family.published}
"""The published models by their Hugging Face id."""

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(config: Mapping[str, Any] | str | None) -> Family | None:
    """The family of a config.json, or of its ``model_type``; None for one that is not declared here."""
    model_type = config.get("model_type") if isinstance(config, Mapping) else config
    return _BY_MODEL_TYPE.get(str(model_type))
