"""Faults, each in one place, that a proof must find. They are put into this process alone, before its ranks fork."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_recipes.kernels.documents import Run
from moe_recipes.models import auto, loss, mamba, mtp
from moe_recipes.models.exporting import convert as export_convert
from moe_recipes.models.exporting import export
from moe_recipes.models.exporting import plan as export_plan
from moe_recipes.models.exporting import verify as export_verify
from moe_recipes.moe import all_to_all, experts
from moe_recipes.runtime.sharding import local_tensor
from moe_recipes.train import loop, optim
from moe_recipes.train import run as run_module

CAPACITY = 80
"""Rows an expert takes in a microbatch: above what the ragged documents send to one, below what the last rows do."""


def clip_norm_per_ep_group() -> None:
    def norm(self: Any) -> torch.Tensor:
        square = {True: torch.zeros(()), False: torch.zeros(())}
        group = None
        for parameter, primary in self.parameters:
            if parameter.grad is not None and primary:
                square[parameter.ndim == 3] += local_tensor(parameter.grad).square().sum()
            if parameter.ndim == 3:
                group = parameter.device_mesh["ep"].get_group()
        dist.all_reduce(square[False])
        dist.all_reduce(square[True], group=group)
        return (square[True] + square[False]).sqrt()

    optim.GradientClip.norm = norm


def lost_router_gradient() -> None:
    call = all_to_all.AllToAllDispatcher.__call__
    all_to_all.AllToAllDispatcher.__call__ = lambda self, x, index, weights: call(self, x, index, weights.detach())


def aux_loss_without_gradient() -> None:
    plain = loss.load_balancing_loss
    loss.load_balancing_loss = lambda logits, **options: plain([each.detach() for each in logits], **options)


def expert_gradients_off_by_ep() -> None:
    plain = loop.forward_backward

    def wrong(run: Any, *args: Any, **kwargs: Any) -> Any:
        shares = plain(run, *args, **kwargs)
        for name, parameter in run.model.named_parameters():
            if ".experts." in name:
                local_tensor(parameter.grad).div_(run.recipe.parallel.ep_size)
        return shares

    loop.forward_backward = wrong


def experts_of_one_rank_saved() -> None:
    plain = run_module.model_entries

    def wrong(model: Any, *, rank: int) -> dict[str, Any]:
        entries = plain(model, rank=rank)
        for name, entry in entries.items():
            if ".experts." in name:
                tensor = entry.tensor.clone()
                dist.broadcast(tensor, src=0)
                entries[name] = dataclasses.replace(entry, tensor=tensor)
        return entries

    run_module.model_entries = wrong


def transposed_down_proj() -> None:
    plain = export_convert.converted_experts

    def wrong(*args: Any, **kwargs: Any) -> Any:
        for key, tensor in plain(*args, **kwargs):
            yield key, tensor.T.reshape(tensor.shape) if "down_proj" in key else tensor

    export.converted_experts = export_verify.converted_experts = wrong  # its own check would find the same wrong


def leaking_mamba_state() -> None:
    plain = mamba.chunk_scan

    def wrong(x: torch.Tensor, *args: Any, shape: Any, **kwargs: Any) -> torch.Tensor:
        rows = Run(rows=slice(0, x.shape[0]), start=0, end=x.shape[1])
        return plain(x, *args, shape=dataclasses.replace(shape, runs=(rows,)), **kwargs)

    mamba.chunk_scan = wrong


def drifting_frozen_bias() -> None:
    plain = loop.train_step

    def wrong(run: Any, batches: Any) -> Any:
        stats = plain(run, batches)
        for name, buffer in run.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 1e-6
        return stats

    loop.train_step = wrong


def clamped_time_step() -> None:
    auto.honour_time_step_limit = lambda model: None


def dropped_tokens() -> None:
    plain = experts.routed_experts

    def wrong(module: Any, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kept = torch.ones_like(weight)
        for expert in range(module.num_experts):
            places = (index == expert).nonzero()[CAPACITY:]
            kept[places[:, 0], places[:, 1]] = 0
        return plain(module, x, index, weight * kept, **kwargs)

    experts.routed_experts = all_to_all.routed_experts = wrong


def leaking_mtp_shift() -> None:
    mtp.same_document = lambda position_ids, depth: torch.ones_like(position_ids, dtype=torch.bool)


def mtp_lost_on_export() -> None:
    plain = export_plan.saved_tensors

    def wrong(model: Any) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in plain(model).items() if not name.startswith("mtp.")}

    export_plan.saved_tensors = export_verify.saved_tensors = wrong


INJECTIONS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        clip_norm_per_ep_group,
        lost_router_gradient,
        aux_loss_without_gradient,
        expert_gradients_off_by_ep,
        experts_of_one_rank_saved,
        transposed_down_proj,
        leaking_mamba_state,
        drifting_frozen_bias,
        clamped_time_step,
        dropped_tokens,
        leaking_mtp_shift,
        mtp_lost_on_export,
    )
}
