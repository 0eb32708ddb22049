"""Weights whose rows change places between the files and the model, such as fused q, k and v, loaded into shards.

Transformers reads of every stored tensor the rows of this rank, and converts what it has read. That is right for
conversions that keep rows, as those of experts do. Where one joins or splits rows, each rank gets other rows than its
own: from a split an error, from a join weights of the right shape and the wrong values, without a word. Here such
tensors are read whole, converted, and cut afterwards, one conversion at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import core_model_loading as loading
from transformers.distributed.sharding_utils import DtensorShardOperation

_READ_WHOLE = "moe_recipes_read_whole"


def mixes_rows(converter: loading.WeightConverter) -> bool:
    """Whether a conversion moves rows. Those of quantised weights are not looked at: their codes are not rows."""
    own = [op for op in converter.operations if type(op).__module__ == loading.__name__]
    return any(not isinstance(op, loading.MergeModulelist) and getattr(op, "dim", 0) < 1 for op in own)


@contextmanager
def mixed_rows_read_whole() -> Iterator[None]:
    """While a sharded model is loaded: tensors of conversions that mix rows are cut after their conversion.

    Transformers has no switch for it, so three of its functions are replaced for the duration.
    """
    spawn, put = loading.spawn_materialize, loading.set_param_for_module
    add = loading.WeightConverter.add_tensor

    def spawn_both(pool: Any, tensor: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
        job = spawn(pool, tensor, device, dtype, **options)
        if options.get("sharding_op") is not None:
            setattr(job, _READ_WHOLE, spawn(None, tensor, device, dtype))
        return job

    def add_whole(self: Any, target_key: str, source_key: str, source_pattern: str, job: Any) -> None:
        whole = getattr(job, _READ_WHOLE, None)
        if whole is not None and mixes_rows(self):
            if hasattr(job, "cancel"):
                job.cancel()
            job = whole
        add(self, target_key, source_key, source_pattern, job)

    def put_part(model: Any, target_name: str, param_value: Tensor, *rest: Any) -> None:
        owner, _, name = target_name.rpartition(".")
        held = getattr(model.get_submodule(owner), name, None)
        is_whole = isinstance(held, DTensor) and held.to_local().shape != held.shape == param_value.shape
        if is_whole:
            part = DtensorShardOperation(held).shard_tensor(param_value, dtype=param_value.dtype)
            assert part is not None
            param_value = part.clone()  # a view would keep the whole tensor
        put(model, target_name, param_value, *rest)

    loading.spawn_materialize, loading.set_param_for_module = spawn_both, put_part
    loading.WeightConverter.add_tensor = add_whole  # type: ignore[method-assign]
    try:
        yield
    finally:
        loading.spawn_materialize, loading.set_param_for_module = spawn, put
        loading.WeightConverter.add_tensor = add  # type: ignore[method-assign]
