"""The drop-in ``AutoModelForCausalLM``: Transformers' classes, with this package's parts where they fit."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.distributed import DistributedConfig

from moe_recipes.config.errors import RecipeError
from moe_recipes.models.attention import choose_attention, report_attention
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.models.disk_keys import accept_disk_keys
from moe_recipes.models.documents import pass_documents
from moe_recipes.models.expert_plan import only_experts_in_plan
from moe_recipes.models.float32_kept import float32_kept
from moe_recipes.models.fused.attention import fuse_attention
from moe_recipes.models.fused.gpt_oss import fuse_gpt_oss
from moe_recipes.models.fused.mla import fuse_mla
from moe_recipes.models.fused.mlp import fuse_mlps
from moe_recipes.models.fused.norms import fuse_norms
from moe_recipes.models.fused.residual import fuse_residual
from moe_recipes.models.loading.conversions import note_conversions
from moe_recipes.models.loading.mixed_rows import mixed_rows_read_whole
from moe_recipes.models.loading.warnings import warn_of_code
from moe_recipes.models.mamba import lean_mamba
from moe_recipes.models.mtp_kept import keep_frozen, mtp_kept
from moe_recipes.models.sharded_init import initialize_shards
from moe_recipes.models.time_step import honour_time_step_limit
from moe_recipes.models.whole_experts import average_gradients, whole_experts_stay_whole
from moe_recipes.moe import EXPERTS, all_to_all, symmetric
from moe_recipes.moe.recompute import checkpoint_contexts, route_once
from moe_recipes.runtime.optimizations import Optimization, describe
from moe_recipes.runtime.sharding import keep_precision

logger = logging.getLogger("moe_recipes.models")
NO_EXPERTS = "the model has no experts behind Transformers' experts interface"


def _layout(distributed_config: DistributedConfig | dict[str, Any] | None) -> DistributedConfig | None:
    """The layout with this package's dispatcher where the caller left the choice open."""
    if isinstance(distributed_config, dict):
        distributed_config = DistributedConfig.from_dict(distributed_config)
    if distributed_config is None or distributed_config.ep_implementation != "auto":
        return distributed_config
    if distributed_config.ep_size == 1 or distributed_config.tp_size > 1:
        return distributed_config
    return dataclasses.replace(distributed_config, ep_implementation=all_to_all.NAME)


def _requested_experts(argument: str | dict[str, str] | None, config: Any) -> str | dict[str, str] | None:
    """The caller's choice of expert computation, from the argument, else from the config; None where it is open.

    Transformers writes its default into the config of every model that it builds, so the default says nothing.
    """
    if argument is None and isinstance(config, PreTrainedConfig):
        found = config.get_text_config()._experts_implementation
        return None if found == "grouped_mm" else found
    return argument


def _choose_attention(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's arguments with the attention that they mean; a path in place of a config says nothing yet."""
    if not isinstance(config, PreTrainedConfig):
        return kwargs
    asked = kwargs.get("attn_implementation") or config.get_text_config()._attn_implementation
    chosen = choose_attention(config, asked)
    return {**kwargs, "attn_implementation": chosen} if chosen != asked else kwargs


def _has_plain_weights(experts: nn.Module) -> bool:
    """False for quantised experts: their own functions undo the quantisation."""
    return all(weight.is_floating_point() and weight.element_size() > 1 for weight in experts.parameters())


@contextmanager
def _laid_out() -> Iterator[None]:
    """While Transformers lays a model out: what it has no switches for."""
    with float32_kept(), whole_experts_stay_whole(), only_experts_in_plan():
        yield


def _dispatch(layout: DistributedConfig | None, *, has_experts: bool) -> Optimization:
    if not has_experts:
        return Optimization("expert dispatch", False, NO_EXPERTS)
    if layout is None or layout.ep_size == 1:
        return Optimization("expert dispatch", False, "ep_size is 1, every rank computes all experts")
    if layout.ep_implementation in (all_to_all.NAME, symmetric.NAME):
        return Optimization("expert dispatch", True, f"all-to-all, one row per (token, rank), ep_size {layout.ep_size}")
    return Optimization("expert dispatch", False, f"ep_implementation is {layout.ep_implementation!r}")


def _finish(
    model: PreTrainedModel, *, experts: str | dict[str, str] | None, layout: DistributedConfig | None
) -> PreTrainedModel:
    """Put this package's experts and router handling into a built model, and say in one line what was done."""
    keep_precision(model, model._get_dtype_plan(torch.bfloat16))
    blocks = moe_blocks(model)
    plain = all(_has_plain_weights(block.experts) for block in blocks)
    if blocks and plain and experts is None:
        model.set_experts_implementation(EXPERTS)
    used = getattr(model.config.get_text_config(), "_experts_implementation", None)
    routers = [block.router for block in blocks if block.router is not None]
    for router in routers:
        route_once(router)
    if blocks:
        accept_disk_keys(model)
    if not blocks:
        found = [Optimization("fused experts", False, NO_EXPERTS)]
    elif not plain:
        found = [Optimization("fused experts", False, "the experts' weights are quantised")]
    elif used != EXPERTS:
        found = [Optimization("fused experts", False, f"experts_implementation is {used!r}")]
    else:
        found = [Optimization("fused experts", True, f"{len(blocks)} layers, grouped matrix products")]
    found += [report_attention(model), fuse_norms(model), fuse_attention(model), fuse_residual(model)]
    for fuse in (fuse_gpt_oss, fuse_mla, fuse_mlps, honour_time_step_limit, lean_mamba, pass_documents):
        found += filter(None, [fuse(model)])
    found.append(_dispatch(layout, has_experts=bool(blocks)))
    if whole := average_gradients(model):
        found.append(Optimization("whole experts outside FSDP2", True, f"{whole} layers, one owner an expert"))
    found.append(
        Optimization(
            "router kept under recomputation",
            bool(routers) and len(routers) == len(blocks),
            f"{len(routers)} of {len(blocks)} blocks have a router module",
        )
    )
    model.moe_recipes_optimizations = found  # type: ignore[assignment]
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("%s: %s", type(model).__name__.removeprefix("FSDP"), describe(found))
    return model


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass, without routing again.

    Raises:
        RecipeError: the family has no recomputation in Transformers.
    """
    if not model.supports_gradient_checkpointing:
        raise RecipeError(
            f"train.activation_checkpointing=full: {model.config.model_type!r} cannot recompute its layers in"
            f" Transformers; set train.activation_checkpointing=none"
        )
    config = model.config.get_text_config()
    drops = any(value for key, value in config.to_dict().items() if "dropout" in key and isinstance(value, float))
    model.activation_checkpointing_enable(
        # Restoring the generator state costs a device sync a layer; only dropout needs it.
        {"use_reentrant": False, "context_fn": checkpoint_contexts, "preserve_rng_state": drops}
    )


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """``transformers.AutoModelForCausalLM`` with fast experts: same arguments, same classes back.

    ``distributed_config=DistributedConfig(fsdp_size=..., ep_size=...)`` gives the layout; with its
    ``ep_implementation`` left at ``"auto"`` tokens travel through this package's dispatcher.
    ``experts_implementation`` left out means this package's expert computation. A model without experts is returned
    as Transformers makes it.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load as Transformers does; each rank reads only the experts and rows that it owns.

        Args: those of ``transformers.AutoModelForCausalLM.from_pretrained``, and
            mtp (default True): load the checkpoint's layers of multi-token prediction too, frozen, so that
                ``save_pretrained`` writes them; False leaves them out as Transformers does, with a warning.
        """
        layout = _layout(kwargs.pop("distributed_config", None))
        if layout is not None:
            kwargs["distributed_config"] = layout
        experts = _requested_experts(kwargs.get("experts_implementation"), kwargs.get("config"))
        kwargs = _choose_attention(kwargs.get("config"), kwargs)
        with _laid_out(), mixed_rows_read_whole(), mtp_kept(wanted=kwargs.pop("mtp", True)):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        warn_of_code(pretrained_model_name_or_path, kwargs)
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        if kwargs.get("attn_implementation") is None and kwargs.get("config") is None:
            chosen = choose_attention(model.config, None)
            if chosen is not None:
                model.set_attn_implementation(chosen)
        model = _finish(model, experts=experts, layout=layout)
        keep_frozen(model)
        return (model, *info) if info else model  # type: ignore[return-value]

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        distributed_config: DistributedConfig | dict[str, Any] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Build with random weights. Without ``distributed_config`` this is Transformers' own ``from_config``.

        Args:
            distributed_config: the layout. The model is built on the meta device and distributed, then each rank draws
                its own shards on its own device, equal for any layout.
            seed: of the weights; rank 0's ``torch.initial_seed()`` if not given. Only with ``distributed_config``.
        """
        layout = _layout(distributed_config)
        experts = _requested_experts(kwargs.get("experts_implementation"), config)
        config = copy.deepcopy(config)  # a plain model that is made of the caller's config must stay plain
        kwargs = _choose_attention(config, kwargs)
        if layout is None:
            with float32_kept():
                model = super().from_config(config, **kwargs)
            _keep_fp32(model)
            return _finish(model, experts=experts, layout=None)
        with _laid_out():
            model = draw_plain_model(config, layout, seed=_agreed_seed(seed), **kwargs)
        return _finish(model, experts=experts, layout=layout)

    @classmethod
    def on_meta(cls, config: PreTrainedConfig, *, distributed_config: DistributedConfig, **kwargs: Any) -> Any:
        """As ``from_config`` with a layout, but this rank's shards stay on the meta device: shapes without bytes."""
        return cls.filled(config, lambda model, device: None, distributed_config=distributed_config, **kwargs)

    @classmethod
    def filled(
        cls,
        config: PreTrainedConfig,
        fill: Callable[[PreTrainedModel, torch.device], object],
        *,
        distributed_config: DistributedConfig,
        **kwargs: Any,
    ) -> Any:
        """As ``from_config`` with a layout; the weights come from ``fill``.

        Args:
            fill: gets the distributed model on the meta device, and the device where this rank's shards belong.
        """
        layout = _layout(distributed_config)
        assert layout is not None
        experts = _requested_experts(kwargs.get("experts_implementation"), config)
        kwargs = _choose_attention(config, kwargs)
        with _laid_out():
            model, device = lay_out_on_meta(copy.deepcopy(config), layout, **kwargs)
            fill(model, device)
        return _finish(model, experts=experts, layout=layout)


def draw_plain_model(
    config: PreTrainedConfig, layout: DistributedConfig, *, seed: int, **kwargs: Any
) -> PreTrainedModel:
    """Transformers' model of this config with random weights, distributed; nothing of this package in its forward."""
    model, device = lay_out_on_meta(config, layout, **kwargs)
    initialize_shards(model, seed=seed, device=device)
    return model


def lay_out_on_meta(
    config: PreTrainedConfig, layout: DistributedConfig, **kwargs: Any
) -> tuple[PreTrainedModel, torch.device]:
    """The distributed model on the meta device, and the device where this rank's shards belong."""
    with torch.device("meta"), hf_init.meta_device_safe_creation_ops():
        model = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
    _keep_fp32(model)
    _untie(model)
    note_conversions(model)
    layout, device, mesh = type(model).prepare_distribute_model(layout)
    if mesh is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return type(model).maybe_distribute_model(model, layout, mesh), torch.device(device)


def _agreed_seed(seed: int | None) -> int:
    if seed is not None:
        return seed
    agreed = [torch.initial_seed()]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def _untie(model: PreTrainedModel) -> None:
    """Give tied weights a tensor each until they are drawn: FSDP2 cannot shard one that two of its groups hold."""
    for name in model.all_tied_weights_keys or ():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, attribute, nn.Parameter(torch.empty_like(getattr(module, attribute))))


def _keep_fp32(model: PreTrainedModel) -> None:
    """What a family keeps in float32 when it is loaded stays float32 when it is drawn."""
    patterns = model._get_dtype_plan(model.dtype)
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and any(pattern in f"{name}.{key}" for pattern in patterns):
                    cast = tensor.data.to(torch.float32)
                    tensors[key] = nn.Parameter(cast) if isinstance(tensor, nn.Parameter) else cast
