"""Random weights that do not depend on the layout: every shard is filled on its own device.

A family's ``_init_weights`` says how a parameter is drawn; here only the drawing itself is replaced. A parameter is
cut into blocks of whole rows, and each block is drawn by a generator seeded with (seed, parameter name, block), so a
rank draws the blocks that touch its rows and nothing else. Equal on every layout for one kind of device; CPU and CUDA
generators differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moe_recipes.runtime.sharding import local_rows, local_tensor

BLOCK_ELEMENTS = 1 << 20
_ELEMENTWISE = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_)


def _seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # generators take signed 64-bit seeds


def _fill(tensor: Tensor, name: str, seed: int, draw: Callable[[Tensor, torch.Generator], Any]) -> None:
    rows, local = local_rows(tensor, rank=0), local_tensor(tensor)
    if rows.count == 0 or local.numel() == 0:
        return
    row_elements = max(1, tensor.numel() // max(1, rows.shape[0] if rows.shape else 1))
    rows_per_block = max(1, BLOCK_ELEMENTS // row_elements)
    end, total = rows.start + rows.count, rows.shape[0] if rows.shape else 1
    for block in range(rows.start // rows_per_block, (end - 1) // rows_per_block + 1):
        first, last = block * rows_per_block, min((block + 1) * rows_per_block, total)
        values = torch.empty((last - first, *rows.shape[1:]), dtype=torch.float32, device=local.device)
        draw(values, torch.Generator(local.device).manual_seed(_seed(seed, name, block)))
        low, high = max(first, rows.start), min(last, end)
        part = values[low - first : high - first]
        target = local[low - rows.start : high - rows.start] if rows.shape else local
        target.copy_(part.reshape(target.shape))


class _ShardedDrawing(TorchFunctionMode):
    """Redirects random fills of parameters, and copies of whole values into shards."""

    def __init__(self, names: dict[int, str], seed: int) -> None:
        super().__init__()
        self.names, self.seed = names, seed

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("tensor")
        name = self.names.get(id(target)) if target is not None else None
        if name is not None and func in _ELEMENTWISE:
            arguments = {key: value for key, value in kwargs.items() if key not in ("tensor", "generator")}
            _fill(target, name, self.seed, lambda v, g: func(v, *args[1:], generator=g, **arguments))
            return target
        if name is not None and getattr(func, "__module__", "") == "torch.nn.init":
            # Fan-in and the like depend on the whole shape: drawn whole, one parameter at a time.
            local = local_tensor(target)
            whole = torch.empty(target.shape, dtype=torch.float32, device=local.device)
            torch.manual_seed(_seed(self.seed, name, 0))
            func(
                whole, *args[1:], **{key: value for key, value in kwargs.items() if key not in ("tensor", "generator")}
            )
            rows = local_rows(target, rank=0)
            local.copy_(whole[rows.start : rows.start + rows.count] if rows.shape else whole)
            return target
        if isinstance(target, DTensor) and func is Tensor.copy_ and not isinstance(args[1], DTensor):
            rows = local_rows(target, rank=0)
            target.to_local().copy_(args[1][rows.start : rows.start + rows.count])
            return target
        if isinstance(target, DTensor) and func is Tensor.__getitem__ and isinstance(args[1], int):
            # `weight[padding_idx]`: a view of the row where this rank holds it, else of nothing.
            rows = local_rows(target, rank=0)
            row = args[1] % rows.shape[0] - rows.start
            return target.to_local()[row : row + 1] if 0 <= row < rows.count else target.to_local()[:0]
        return func(*args, **kwargs)


@torch.no_grad()
def initialize_shards(model: PreTrainedModel, *, seed: int, device: torch.device) -> None:
    """Materialise a model on ``device`` and draw its weights; call it on every rank of the model's layout.

    Args:
        model: on the meta device, already distributed (or in one process).
        seed: the same on all ranks.
    """
    model.to_empty(device=device)
    model.tie_weights()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    names.update({id(buffer): name for name, buffer in model.named_buffers()})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _ShardedDrawing(names, seed):
        _initialize_below(model, model, prefix="", seed=seed, done=set())


def _initialize_below(
    module: nn.Module, owner: PreTrainedModel, *, prefix: str, seed: int, done: set[nn.Parameter]
) -> None:
    """Children first, each by the ``_init_weights`` of the nearest model above it, as Transformers does.

    A tied output projection is left as its embedding was drawn: drawn again, the padding row would not be zero.
    """
    if isinstance(module, PreTrainedModel):
        owner = module
    for name, child in module.named_children():
        _initialize_below(child, owner, prefix=f"{prefix}{name}.", seed=seed, done=done)
    own = set(module.parameters(recurse=False))
    if own and own <= done:
        return
    done |= own
    torch.manual_seed(_seed(seed, f"module {prefix}", 0))  # for values drawn on the side and copied in
    owner._init_weights(module)
