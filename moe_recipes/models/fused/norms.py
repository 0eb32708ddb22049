"""RMSNorm modules of Transformers through the fused kernel, where their source is the one that it computes."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_recipes.kernels.rms_norm import rms_norm
from moe_recipes.kernels.triton import use_triton
from moe_recipes.models.blocks import body_of, forward_source_of
from moe_recipes.runtime.optimizations import Optimization

_NORMALISED = """\
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
"""
STANDARD_FORWARD = f"{_NORMALISED}return self.weight * hidden_states.to(input_dtype)"
WIDE_FORWARDS = (
    f"{_NORMALISED}return (self.weight * hidden_states).to(input_dtype)",
    f"{_NORMALISED}return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)",
)
"""Rounded once, after the weight: GPT-OSS and Nemotron-H."""


@functools.cache  # asked for every call of a fused block
def _source(kind: type[nn.Module]) -> str:
    function = forward_source_of(kind)
    return "" if function is None else body_of(function)


def _computes_rms_norm(kind: type[nn.Module]) -> bool:
    return _source(kind) == STANDARD_FORWARD


def is_standard(module: nn.Module) -> bool:
    """True if the module's class has exactly a forward that the kernel replaces."""
    known = _source(type(module)) in (STANDARD_FORWARD, *WIDE_FORWARDS)
    return hasattr(module, "variance_epsilon") and "forward" not in module.__dict__ and known


def runs_alone(norm: nn.Module) -> bool:
    """True while a call of the norm is the kernel's computation and nothing more, so that a larger kernel may do it:
    no hook (tensor parallelism, FSDP2 and tracing tools set some), no wrapper such as PEFT's, a whole weight.
    """
    forward = norm.__dict__.get("forward")
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    plain = not hooks and (forward is None or isinstance(forward, _FusedForward))
    return plain and _computes_rms_norm(type(norm)) and not isinstance(norm.weight, DTensor)


class _FusedForward:
    """A norm's forward. An object and not a closure: it is copied and pickled together with its norm."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, hidden_states: Tensor) -> Tensor:
        norm = self.norm
        if use_triton(hidden_states) and hidden_states.dtype == norm.weight.dtype:
            rounds_first = _computes_rms_norm(type(norm))
            return rms_norm(hidden_states, norm.weight, norm.variance_epsilon, rounds_first=rounds_first)
        return type(norm).forward(norm, hidden_states)


def fuse_norms(model: nn.Module) -> Optimization:
    """Give every standard RMSNorm of the model the fused forward; on the CPU it keeps computing as it did."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    standard = [module for module in norms if is_standard(module)]
    for module in standard:
        module.forward = _FusedForward(module)  # type: ignore[method-assign]
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    reason = f"{len(standard)} of {len(norms)} norms" if on_gpu else "the model is not on a GPU"
    return Optimization("fused RMSNorm", bool(standard) and on_gpu, reason)
