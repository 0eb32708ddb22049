"""A_log, D and dt_bias of Nemotron-H's Mamba layers: float32 whatever the model's dtype, whole on every rank.

FSDP2 gathers what lies in one group in one dtype, and these three lie beside bfloat16 weights in the same module. They
are a few hundred numbers a layer, so they stay out of it: replicas, as DTensors of the same mesh, whose gradients one
all-reduce a layer adds up in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers.distributed import fsdp as transformers_fsdp
from transformers.models.nemotron_h import modeling_nemotron_h as hf

from moe_recipes.families import NEMOTRON_H
from moe_recipes.models.blocks import fingerprint

MIXER = "6cb8fb31e9d45cb3"
"""Fingerprint of the mixer whose parameters these are, and whose forward ``models/mamba.py`` replaces."""

NAMES = NEMOTRON_H.float32
PATTERNS = tuple(f"mixer.{name}" for name in NAMES)
"""What Transformers' list of float32 modules finds them by."""

_SUMS = "_moe_recipes_sums_gradients"


def found_source() -> str:
    """Fingerprint of the same functions in the installed Transformers."""
    return fingerprint(
        hf.NemotronHMamba2Mixer.forward, hf.NemotronHMamba2Mixer.__init__, hf.NemotronHRMSNormGated.forward,
        hf.causal_conv1d_fn, hf.mamba2_chunk_scan, hf.apply_mask_to_padding_states,
    )  # fmt: skip


@functools.cache
def mixer_is_known() -> bool:
    """True if the installed Transformers has the mixer that this package replaces."""
    return found_source() == MIXER


def is_kept(module: nn.Module) -> bool:
    """True for a module with such parameters, whose forward this package replaces: Transformers' would mix replicas
    with local tensors."""
    return isinstance(module, hf.NemotronHMamba2Mixer) and mixer_is_known() and module.activation in ("silu", "swish")


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters below ``model`` that are replicas on purpose, by name."""
    return {
        f"{prefix}.{name}".lstrip("."): getattr(module, name)
        for prefix, module in model.named_modules()
        if is_kept(module)
        for name in NAMES
    }


@contextmanager
def float32_kept() -> Iterator[None]:
    """While a model is built and loaded: Transformers counts these parameters among what it keeps in float32, and
    FSDP2 leaves them alone. Neither has a switch for it, so their names for it are replaced for the duration."""
    kind, fully_shard = hf.NemotronHPreTrainedModel, transformers_fsdp.fully_shard
    names = kind._keep_in_fp32_modules_strict

    def shard(module: Any, *, mesh: DeviceMesh, ignored_params: set[nn.Parameter] | None = None, **options: Any) -> Any:
        if isinstance(module, nn.Module) and is_kept(module):
            return module  # Transformers gives a module with float32 parameters a group; the layer's holds the rest
        ignored = (ignored_params or set()).union(*(_replicate(one, mesh) for one in _listed(module)))
        return fully_shard(module, mesh=mesh, **options, **({"ignored_params": ignored} if ignored else {}))

    if mixer_is_known():
        kind._keep_in_fp32_modules_strict = [*(names or ()), *PATTERNS]
        transformers_fsdp.fully_shard = shard
    try:
        yield
    finally:
        kind._keep_in_fp32_modules_strict = names
        transformers_fsdp.fully_shard = fully_shard


def _listed(modules: nn.Module | list[nn.Module]) -> list[nn.Module]:
    return [modules] if isinstance(modules, nn.Module) else modules


def _replicate(module: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Make the kept parameters below ``module`` replicas over ``mesh``, once; returns them."""
    found = set()
    for mixer in filter(is_kept, module.modules()):
        for name in NAMES:
            parameter = getattr(mixer, name)
            if not isinstance(parameter, DTensor):
                replica = DTensor.from_local(parameter.data, mesh, [Replicate()] * mesh.ndim, run_check=False)
                parameter = nn.Parameter(replica, requires_grad=parameter.requires_grad)
                setattr(mixer, name, parameter)
            found.add(parameter)
    return found


def sum_kept_gradients(model: nn.Module) -> None:
    """From now on sum their gradients over the ranks instead of averaging, as ``sum_gradients`` does for the others."""
    for module in filter(is_kept, model.modules()):
        setattr(module, _SUMS, True)


class _Local(torch.autograd.Function):
    """Replicas as local tensors; backward adds the ranks' gradients up, all in one all-reduce a dimension."""

    @staticmethod
    def forward(ctx: Any, divisor: float, *replicas: DTensor) -> tuple[Tensor, ...]:
        ctx.divisor, ctx.mesh, ctx.shapes = divisor, replicas[0].device_mesh, [r.shape for r in replicas]
        return tuple(replica.to_local().detach() for replica in replicas)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat = torch.cat([grad.float().flatten() for grad in grads])
        mesh: DeviceMesh = ctx.mesh
        if mesh.size() == dist.get_world_size():  # one reduction: replicas of replicas get the same bits
            dist.all_reduce(flat)
        else:
            for dimension in range(mesh.ndim):
                dist.all_reduce(flat, group=mesh.get_group(dimension))
        parts = flat.div_(ctx.divisor).split([shape.numel() for shape in ctx.shapes])
        placements = [Replicate()] * mesh.ndim
        whole = [
            DTensor.from_local(part.view(shape).to(grad.dtype), mesh, placements, run_check=False)
            for part, shape, grad in zip(parts, ctx.shapes, grads, strict=True)
        ]
        return None, *whole


def local_parameters(module: nn.Module, *names: str) -> tuple[Tensor, ...]:
    """Parameters of a module as tensors to compute with; replicas get the gradient of all ranks' batches."""
    parameters = [getattr(module, name) for name in names]
    if not isinstance(parameters[0], DTensor):
        return tuple(parameters)
    divisor = 1.0 if getattr(module, _SUMS, False) else float(parameters[0].device_mesh.size())
    return _Local.apply(divisor, *parameters)  # type: ignore[no-any-return]


@contextmanager
def local_in_place(module: nn.Module, *names: str) -> Iterator[None]:
    """While code that knows no replicas runs: the module's parameters are the tensors of ``local_parameters``."""
    held = {name: module._parameters[name] for name in names}
    module._parameters.update(zip(names, local_parameters(module, *names), strict=True))  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(held)
