"""Expert-parallel fine-tuning of mixture-of-experts models. Importing this package imports no torch.

``from moe_recipes import AutoModelForCausalLM`` replaces the import from ``transformers``; the class is loaded on
first use, so that the command line starts on a login node without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

    from moe_recipes.models.auto import AutoModelForCausalLM

__all__ = ["AutoModelForCausalLM", "DistributedConfig", "__version__"]


_HOMES = {"AutoModelForCausalLM": "moe_recipes.models.auto", "DistributedConfig": "transformers.distributed"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
