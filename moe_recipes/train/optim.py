"""Optimizer, learning rate and clipping over parameters that live on different meshes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_recipes.checkpoint.entry import Entry
from moe_recipes.config.errors import EnvironmentMismatchError
from moe_recipes.config.recipe import Optim
from moe_recipes.runtime.sharding import local_rows, local_tensor
from moe_recipes.train.lean_adamw import LeanAdamW


def learning_rate(optim: Optim, *, step: int, steps: int) -> float:
    """Rate of a step, counted from 0: linear warm-up to ``lr``, then the schedule down to ``lr * min_lr_ratio``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    done = min(1.0, done)
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """One group a (mesh, dtype, decay): torch's batched optimizer kernels refuse tensors of different meshes.

    Tensors with one dimension (norms) and biases, also those of experts, which have two, get no decay.
    """
    groups: dict[Any, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            decays = parameter.ndim > 1 and not name.endswith("bias")
            groups[(mesh, parameter.dtype, decays)].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in named],
            "names": [name for name, _ in named],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for (_, _, decay), named in groups.items()
    ]


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The recipe's optimizer over this rank's shards.

    Raises:
        EnvironmentMismatchError: flashoptim or a GPU is missing for ``flash_adamw``.
    """
    groups = parameter_groups(model, weight_decay=optim.weight_decay)
    options = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, **options, foreach=True)
    if optim.name == "lean_adamw":
        return LeanAdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
    if not torch.cuda.is_available():
        raise EnvironmentMismatchError("optim.name=flash_adamw needs a GPU; use optim.name=lean_adamw")
    try:
        from flashoptim import FlashAdamW
    except ImportError as error:
        raise EnvironmentMismatchError(f"optim.name=flash_adamw: {error}; `pip install flashoptim==0.1.4`") from error
    return FlashAdamW(groups, **options, master_weight_bits=32)


class GradientClip:
    """Has all gradients scaled so that their global norm is at most ``max_norm``; 0 only measures it.

    Every element counts once: each rank adds the squares of the rows for which it is the primary replica, and the sum
    goes over all ranks, so an expert held by one group and a weight sharded over all weigh alike. Replicas hold equal
    gradients, so all ranks find the same factor.
    """

    def __init__(self, model: nn.Module, *, max_norm: float, rank: int) -> None:
        self.max_norm = max_norm
        self.parameters = [
            (parameter, local_rows(parameter, rank=rank).primary)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def norm(self) -> Tensor:
        """The global norm, a float32 scalar on the device. No host sync."""
        counted = [gradient for gradient, primary in self._gradients() if primary]
        device = self.parameters[0][0].device
        square = torch.zeros((), dtype=torch.float32, device=device)
        if counted:
            square = torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float32)).square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def scale(self, norm: float, optimizer: torch.optim.Optimizer) -> None:
        """Scale where ``norm`` asks for it: in the optimizer's own pass where it can, else the gradients in place, by a
        host number. With a factor on the device torch makes one slow pass a tensor, three times the time of its batched
        kernels."""
        factor = self.max_norm / (norm + 1e-6)
        if self.max_norm == 0 or factor >= 1:
            return
        if isinstance(optimizer, LeanAdamW):
            optimizer.grad_factor = factor
            return
        gradients: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for gradient, _ in self._gradients():
            gradients[gradient.dtype].append(gradient)
        for same_dtype in gradients.values():
            torch._foreach_mul_(same_dtype, factor)

    def _gradients(self) -> Iterator[tuple[Tensor, bool]]:
        """This rank's part of each gradient that is not empty, and whether it counts here."""
        for parameter, primary in self.parameters:
            if parameter.grad is not None:
                local = local_tensor(parameter.grad)
                if local.numel():
                    yield local, primary


def _state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor, bool]]:
    """``(name, local tensor, opaque)`` of a parameter's optimizer state, which exists."""
    for name, value in optimizer.state[parameter].items():
        if hasattr(value, "kernel_tensor"):  # flashoptim's quantised moments: codes and scales of groups of 32
            if value.is_quantized():
                yield f"{name}.codes", value.quantized, True
                yield f"{name}.scales", value.scales, True
            else:
                yield name, value.data, False
        elif name != "step":
            yield name, local_tensor(value), False


def prepare_state(optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Give every parameter its optimizer state, as after ``step`` steps, so that a checkpoint can fill it in place."""
    if isinstance(optimizer, LeanAdamW):
        optimizer.steps_done = step
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(optimizer, "_ensure_state_initialized"):
                optimizer._ensure_state_initialized(parameter, hparams=group)
                optimizer.state[parameter]["step"].fill_(step)
            else:
                optimizer.state[parameter].update(
                    step=torch.tensor(float(step)),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )


def optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int) -> dict[str, Entry]:
    """This rank's part of the optimizer state, by global name ``optim.STATE.PARAMETER``."""
    entries = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, LeanAdamW):
            for state, tensor, rows in optimizer.state_rows(parameter, rank=rank):
                entries[f"optim.{state}.{name}"] = Entry(tensor=tensor, rows=rows)
        else:
            rows = local_rows(parameter, rank=rank)
            for state, tensor, opaque in _state_tensors(optimizer, parameter):
                entries[f"optim.{state}.{name}"] = Entry(tensor=tensor, rows=rows, opaque=opaque)
    return entries
