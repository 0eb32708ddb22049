"""RMSNorm modules of Transformers through the fused kernel, where their source is the one that it computes."""

from __future__ import annotations

import ast

from torch import Tensor, nn

from moe_recipes.kernels.rms_norm import rms_norm
from moe_recipes.kernels.triton import use_triton
from moe_recipes.models.blocks import forward_source
from moe_recipes.runtime.optimizations import Optimization

STANDARD_FORWARD = """\
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)"""


def is_standard(module: nn.Module) -> bool:
    """True if the module's class has exactly the forward that the kernel replaces."""
    if not hasattr(module, "variance_epsilon") or "forward" in module.__dict__:
        return False
    function = forward_source(module)
    if function is None:
        return False
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return "\n".join(map(ast.unparse, body)) == STANDARD_FORWARD


class _FusedForward:
    """A norm's forward. An object and not a closure: it is copied and pickled together with its norm."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, hidden_states: Tensor) -> Tensor:
        norm = self.norm
        if use_triton(hidden_states) and hidden_states.dtype == norm.weight.dtype:
            return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
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
