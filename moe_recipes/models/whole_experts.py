"""Experts that live whole on one rank, kept out of FSDP2.

With ``efsdp_size`` 1 an expert has one owner: there is nothing to gather and nothing to reduce. FSDP2 on a group of one
rank does both all the same: it copies every expert weight four times a step and takes every gradient through float32
buffers and back, about 45 bytes of memory traffic a parameter and 10 bytes held for the layer at work. Left out of it,
the weights are used where they are and the gradients stay where the matrix product wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers.distributed import fsdp as transformers_fsdp

from moe_recipes.models.float32_kept import sum_kept_gradients

_DIVISOR = "_moe_recipes_gradient_divisor"
_HOOKS = "_moe_recipes_gradient_hooks"


def _gains_nothing(module: nn.Module, *, mesh: Any, mp_policy: Any, offload_policy: Any) -> bool:
    """True if FSDP2 on this mesh would neither shard the module nor change how it computes."""
    if mesh.size() > 1 or isinstance(offload_policy, CPUOffloadPolicy):
        return False
    compute_dtype = getattr(mp_policy, "param_dtype", None)
    return all(compute_dtype in (None, parameter.dtype) for parameter in module.parameters())


@contextmanager
def whole_experts_stay_whole() -> Iterator[None]:
    """While Transformers lays a model out: leave modules whose shards would have one owner out of FSDP2.

    Transformers has no switch for it, so its ``fully_shard`` is replaced for the duration. Such a module keeps the
    gradient divisor that FSDP2 was to apply; ``average_gradients`` and ``sum_gradients`` say what becomes of it.
    """
    fully_shard: Callable[..., Any] = transformers_fsdp.fully_shard
    whole: list[nn.Module] = []

    def shard(module: Any, *, mesh: Any, **options: Any) -> Any:
        policies = {key: options.get(key) for key in ("mp_policy", "offload_policy")}
        if isinstance(module, nn.Module) and _gains_nothing(module, mesh=mesh, **policies):
            whole.append(module)
            # Transformers sets the divisor on what it takes for an FSDP2 module.
            module.set_gradient_divide_factor = partial(setattr, module, _DIVISOR)  # type: ignore[assignment]
            return module
        ignored = {parameter for one in whole for parameter in one.parameters()}
        return fully_shard(module, mesh=mesh, **options, **({"ignored_params": ignored} if ignored else {}))

    transformers_fsdp.fully_shard = shard
    try:
        yield
    finally:
        transformers_fsdp.fully_shard = fully_shard
        for module in whole:
            del module.set_gradient_divide_factor


def average_gradients(model: nn.Module) -> int:
    """Divide the gradients of whole experts by the number of batches that reach them, as FSDP2 does for all others.

    Call it once, when the parameters are the ones that will train. Returns how many modules have whole experts.
    """
    divided = [(module, divisor) for module in model.modules() if (divisor := getattr(module, _DIVISOR, None))]
    for module, divisor in divided:
        hooks = [p.register_hook(partial(torch.div, other=divisor)) for p in module.parameters() if p.requires_grad]
        setattr(module, _HOOKS, hooks)
    return len(divided)


def sum_gradients(model: nn.Module) -> None:
    """Sum every gradient over the ranks instead of averaging: for a loss that already is each rank's share.

    Saves a pass over the gradients of whole experts, and FSDP2's division.
    """
    sum_kept_gradients(model)
    for module in model.modules():
        for hook in module.__dict__.pop(_HOOKS, ()):
            hook.remove()
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Any other factor than the group's size goes through PREMUL_SUM, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
