"""``lean_adamw``: the optimizer over this rank's shards. Its arithmetic is ``kernels/lean_adamw.py``."""

from __future__ import annotations

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_recipes.kernels.lean_adamw import BLOCK, Part, Plan, Step, step_reference
from moe_recipes.kernels.triton import use_triton
from moe_recipes.runtime.sharding import Rows, local_rows, local_tensor


class LeanAdamW(torch.optim.Optimizer):
    """AdamW with decoupled decay: bfloat16 weights keep an exact float32 master in 2 more bytes, moments take 1 each.

    A weight whose rows (elements under one index of dimension 0) are no multiple of ``BLOCK`` elements, and every one
    with a single dimension, keeps float32 moments: then a block of codes never lies across two ranks' shards, and
    any layout can load what another one saved. float32 weights get float32 moments too.

    Args:
        groups: ``{"params": [...], "names": [...], "weight_decay": float}``; a name, the same on all ranks, makes the
            parameter's rounding its own.
        grad_factor: attribute, what the next step multiplies every gradient with; it goes back to 1 after the step.
    Raises:
        ValueError: a weight that is neither bfloat16 nor float32.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "names": []})
        self.grad_factor, self.steps_done = 1.0, 0
        self._parts: dict[nn.Parameter, Part] = {}
        self._plans: tuple[tuple[tuple[int, torch.dtype], ...], list[tuple[Plan, list[int]]]] = ((), [])
        for parameter, name, _ in self._parameters():
            self._add_state(parameter, name)

    def _parameters(self) -> Iterator[tuple[nn.Parameter, str, float]]:
        for group in self.param_groups:
            for parameter, name in zip(group["params"], group["names"], strict=True):
                yield parameter, name, group["weight_decay"]

    def _add_state(self, parameter: nn.Parameter, name: str) -> None:
        local = local_tensor(parameter.detach())
        if local.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"lean_adamw: {name} is {local.dtype}; weights must be bfloat16 or float32")
        state: dict[str, Tensor] = {}
        # By counts alone: one row of a DTensor would be gathered from all ranks, with the whole tensor around it.
        row_elements = parameter.numel() // len(parameter) if parameter.ndim > 1 and len(parameter) else 0
        if local.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros_like(local, dtype=torch.int16)
        if local.dtype == torch.bfloat16 and row_elements and row_elements % BLOCK == 0:
            scales = local.new_zeros(len(local), row_elements // BLOCK, dtype=torch.float32)
            state |= {
                "exp_avg": torch.zeros_like(local, dtype=torch.int8),
                "exp_avg_scale": scales,
                "exp_avg_sq": torch.zeros_like(local, dtype=torch.uint8),
                "exp_avg_sq_scale": scales.clone(),
            }
        else:
            state |= {key: torch.zeros_like(local, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
        self.state[parameter] = state

    def _part(self, parameter: nn.Parameter, name: str, weight_decay: float) -> Part:
        weight, known = local_tensor(parameter.detach()), self._parts.get(parameter)
        if known is not None and known.weight.data_ptr() == weight.data_ptr() and known.weight_decay == weight_decay:
            return known
        rows = local_rows(parameter, rank=0)
        row_elements = parameter.numel() // rows.shape[0] if rows.shape and rows.shape[0] else 1
        flat = {key: value.view(-1) for key, value in self.state[parameter].items()}
        self._parts[parameter] = Part(
            weight=weight.view(-1),
            remainder=flat.get("remainder"),
            exp_avg=flat["exp_avg"],
            exp_avg_sq=flat["exp_avg_sq"],
            exp_avg_scale=flat.get("exp_avg_scale"),
            exp_avg_sq_scale=flat.get("exp_avg_sq_scale"),
            offset=rows.start * row_elements,
            seed=zlib.crc32(name.encode()),
            weight_decay=weight_decay,
        )
        return self._parts[parameter]

    def _next_step(self) -> Step:
        group = self.param_groups[0]
        self.steps_done += 1
        factor, self.grad_factor = self.grad_factor, 1.0
        beta1, beta2 = group["betas"]
        return Step(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            number=self.steps_done,
            grad_factor=factor,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient; no host sync."""
        if closure is not None:
            raise ValueError("lean_adamw takes no closure: it steps once a call")
        step, parts, grads = self._next_step(), [], []
        for parameter, name, weight_decay in self._parameters():
            grad = None if parameter.grad is None else local_tensor(parameter.grad)
            if grad is not None and grad.numel():
                parts.append(self._part(parameter, name, weight_decay))
                grads.append(grad.contiguous().view(-1))
        if not parts:
            return
        if not use_triton(parts[0].weight):
            step_reference(parts, grads, step)
            return
        for plan, members in self._launches(parts, grads):
            plan.launch([grads[index] for index in members], step)

    def _launches(self, parts: list[Part], grads: list[Tensor]) -> list[tuple[Plan, list[int]]]:
        """The plans of one step and which parts each takes; made anew only when parts or gradients' dtypes change."""
        key = tuple((id(part), grad.dtype) for part, grad in zip(parts, grads, strict=True))
        if self._plans[0] != key:
            kinds: dict[Any, list[int]] = defaultdict(list)
            for index, (part, grad) in enumerate(zip(parts, grads, strict=True)):
                kinds[part.kind, grad.dtype].append(index)
            self._plans = key, [(Plan([parts[i] for i in members]), members) for members in kinds.values()]
        return self._plans[1]

    def state_rows(self, parameter: nn.Parameter, *, rank: int) -> Iterator[tuple[str, Tensor, Rows]]:
        """``(name, local tensor, rows)`` of a parameter's state, for a checkpoint. Scales have the parameter's rows and
        a width of their own."""
        rows = local_rows(parameter, rank=rank)
        for name, tensor in self.state[parameter].items():
            shape = (rows.shape[0], *tensor.shape[1:]) if name.endswith("_scale") else rows.shape
            yield name, tensor, dataclasses.replace(rows, shape=shape)
