"""The conversions between a model's tensors and its files, as Transformers has them for the model's class.

Transformers looks them up by class. FSDP2 gives a distributed model a class of its own, for which some are not found
(Nemotron-H's files say ``backbone.`` where the model says ``model.``), so they are noted before.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform

_USED = "_weight_conversions"
"""Where Transformers keeps the conversions that a model was loaded with; saving and exporting undo these."""

_KNOWN = "moe_recipes_conversions"


def note_conversions(model: PreTrainedModel) -> None:
    """Keep the conversions of a model that is not distributed yet. Until it is loaded, an export undoes those that
    Transformers would undo for a model of random weights."""
    setattr(model, _KNOWN, get_model_conversion_mapping(model))
    saved = get_model_conversion_mapping(model, add_legacy=False)
    setattr(model, _USED, [one for one in saved if not isinstance(one, PrefixChange)])


def known_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """All conversions that a file of the model may need; each knows whether it was used."""
    found = getattr(model, _KNOWN, None)
    return get_model_conversion_mapping(model) if found is None else found


def keep_used(model: PreTrainedModel, used: list[WeightTransform]) -> None:
    """From now on an export undoes these, so that it has the names of the files."""
    setattr(model, _USED, used)
