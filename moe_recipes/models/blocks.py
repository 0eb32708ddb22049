"""Finding the parts of a Transformers model that this package works on, by what they declare, not by their names."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class MoeBlock:
    """One mixture-of-experts block of a model."""

    name: str
    """Module path of the experts."""

    layer: int
    """Decoder layer it belongs to; -1 outside the layers."""

    experts: nn.Module
    router: nn.Module | None


def is_experts(module: nn.Module) -> bool:
    """True for modules that Transformers' ``use_experts_implementation`` decorates."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "_is_expert_parallel")


def _router_of(block: nn.Module) -> nn.Module | None:
    for child in block.children():
        if "router" in type(child).__name__.lower():
            return child
    return None


def moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every block whose experts go through Transformers' experts interface, in order."""
    found = []
    for name, module in model.named_modules():
        if is_experts(module):
            number = re.search(r"\.(\d+)\.", f".{name}.")
            block = model.get_submodule(name.rpartition(".")[0])
            layer = int(number.group(1)) if number else -1
            found.append(MoeBlock(name=name, layer=layer, experts=module, router=_router_of(block)))
    return found


def forward_source(module: nn.Module) -> ast.FunctionDef | None:
    """The parsed forward of the module's class, without decorators' wrappers; None where there is no source."""
    return _forward_source_of(type(module))


@functools.cache  # a model has hundreds of modules of a few classes
def _forward_source_of(kind: type[nn.Module]) -> ast.FunctionDef | None:
    forward = next((base.__dict__["forward"] for base in kind.__mro__ if "forward" in base.__dict__), None)
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body[0]  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return None
    return function if isinstance(function, ast.FunctionDef) else None
