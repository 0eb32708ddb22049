"""Finding the parts of a Transformers model that this package works on, by what they declare, not by their names."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from moe_recipes.runtime.optimizations import Optimization


@dataclass(frozen=True, kw_only=True)
class MoeBlock:
    """One mixture-of-experts block of a model."""

    name: str
    """Module path of the experts."""

    layer: int
    """Decoder layer it belongs to; -1 outside the layers. Layers of multi-token prediction count on from the last."""

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
            layer = getattr(module, "moe_recipes_layer", int(number.group(1)) if number else -1)
            found.append(MoeBlock(name=name, layer=layer, experts=module, router=_router_of(block)))
    return found


def forward_source(module: nn.Module) -> ast.FunctionDef | None:
    """The parsed forward of the module's class, without decorators' wrappers; None where there is no source."""
    return forward_source_of(type(module))


@functools.cache  # a model has hundreds of modules of a few classes
def forward_source_of(kind: type[nn.Module]) -> ast.FunctionDef | None:
    """As ``forward_source``, of a class."""
    return _parsed(next((base.__dict__["forward"] for base in kind.__mro__ if "forward" in base.__dict__), None))


def _parsed(function: Any) -> ast.FunctionDef | None:
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return parsed if isinstance(parsed, ast.FunctionDef) else None


def body_of(function: ast.FunctionDef) -> str:
    """What a function does, as text without comments and docstring."""
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return "\n".join(map(ast.unparse, body))


def fingerprint(*functions: Any) -> str:
    """Hash of the parameters and bodies of functions; comments, docstrings and decorators do not count."""
    parsed = [_parsed(function) for function in functions]
    texts = ["" if each is None else f"{ast.unparse(each.args)}\n{body_of(each)}" for each in parsed]
    return hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:16]


def modules_of_class(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Modules of exactly this class whose forward nobody has replaced. FSDP2's own subclass in front does not count."""
    found = []
    for module in model.modules():
        plain = next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule))
        if plain is kind and "forward" not in module.__dict__:
            found.append(module)
    return found


def put_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module one of ``kind``, a subclass of its class with another forward.

    A module that FSDP2 has sharded stays one of FSDP2's: ``from_pretrained`` builds and shards in one call.
    """
    now = type(module)
    module.__class__ = _sharded_class(now, kind) if issubclass(now, FSDPModule) else kind


@functools.cache
def _sharded_class(now: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    # As fully_shard does it: its mixin in front, then the class.
    return type(now.__name__, (now.__bases__[0], kind), {"__deepcopy__": now.__dict__["__deepcopy__"]})


def fuse_class(
    model: nn.Module, theirs: type[nn.Module], ours: type[nn.Module], *, name: str, source: str, replaced: str
) -> Optimization:
    """Give every module of Transformers' class ``theirs`` the forward of its subclass ``ours``.

    On the CPU that runs the kernel's torch reference.

    Args:
        source: fingerprint of what ``ours`` stands for, as it is installed; ``replaced``: as ``ours`` expects it.
    """
    found = modules_of_class(model, theirs)
    if not found:
        return Optimization(name, False, f"no {theirs.__name__} in the model")
    if source != replaced:
        return Optimization(name, False, f"Transformers' {theirs.__name__} is not the one that it replaces")
    for module in found:
        put_class(module, ours)
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return Optimization(name, on_gpu, f"{len(found)} layers" if on_gpu else "the model is not on a GPU")
