"""Parameters with random state for tests of ``kernels/lean_adamw.py``, on any device."""

from __future__ import annotations

import torch

from moe_recipes.kernels.lean_adamw import BLOCK, Part

STATE = ("weight", "remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
KINDS = {"codes": (True, True), "float32 moments": (True, False), "float32 weights": (False, False)}


def new_part(count: int, *, kind: str, device: str = "cpu", offset: int = 0, seed: int = 7) -> Part:
    """A parameter before its first step."""
    has_remainder, has_codes = KINDS[kind]
    weight = torch.randn(count).to(torch.bfloat16 if has_remainder else torch.float32)
    scale = torch.zeros(count // BLOCK) if has_codes else None
    tensors = {
        "weight": weight,
        "remainder": torch.zeros(count, dtype=torch.int16) if has_remainder else None,
        "exp_avg": torch.zeros(count, dtype=torch.int8 if has_codes else torch.float32),
        "exp_avg_sq": torch.zeros(count, dtype=torch.uint8 if has_codes else torch.float32),
        "exp_avg_scale": scale,
        "exp_avg_sq_scale": None if scale is None else scale.clone(),
    }
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    return Part(**moved, offset=offset, seed=seed, weight_decay=0.1)  # type: ignore[arg-type]


def copied(part: Part, device: str) -> Part:
    tensors = {name: getattr(part, name) for name in STATE}
    moved = {name: None if tensor is None else tensor.to(device, copy=True) for name, tensor in tensors.items()}
    return Part(**moved, offset=part.offset, seed=part.seed, weight_decay=part.weight_decay)  # type: ignore[arg-type]


def differing(one: Part, other: Part) -> list[str]:
    """Names of the state tensors that are not equal bit for bit."""
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in STATE)
    return [name for name, a, b in pairs if a is not None and not torch.equal(a.cpu(), b.cpu())]
