"""The expert-parallel plan of a family, held to its experts.

Some plans also cut dense layers by columns and rows over the ranks of an expert group. That adds up partial results
of ranks that hold the same tokens. Without tensor parallelism every rank has tokens of its own, and FSDP2 shards the
dense layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed import mixin
from transformers.distributed.expert_parallel import ExpertParallelLayer
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES


@contextmanager
def only_experts_in_plan() -> Iterator[None]:
    """While Transformers lays a model out: where tokens differ between ranks, its plan reaches experts alone.

    Transformers has no switch for it, so its function is replaced for the duration.
    """
    apply = mixin.apply_expert_parallelism

    def apply_to_experts(
        model: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, plan: dict[str, str], *rest: Any, **options: Any
    ) -> Any:
        if tp_mesh.size() == 1:
            plan = {
                name: style
                for name, style in plan.items()
                if isinstance(ALL_PARALLEL_STYLES[style], ExpertParallelLayer)
            }
        return apply(model, ep_mesh, tp_mesh, plan, *rest, **options)

    mixin.apply_expert_parallelism = apply_to_experts  # type: ignore[assignment]
    try:
        yield
    finally:
        mixin.apply_expert_parallelism = apply
