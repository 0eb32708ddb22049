"""Multi-token prediction (MTP): the extra blocks of a checkpoint that predict tokens further ahead.

Transformers drops them on load. Here they are part of the model before it is laid out and loaded, under the names that
the checkpoint gives them, so that loading, sharding, recompute, clipping, checkpoints and export treat them as they
treat every other layer.

    depth k, position t      x = eh_proj(cat[enorm(embedding of token t + k), hnorm(h_{k-1} at t)])
                             h_k = block(x), which predicts token t + k + 1 through the model's output projection

``h_0`` is the model's last hidden state, after its final norm. Position t takes part at depth k only where the tokens
t ... t + k belong to one document; the label at t + k is one of that document by itself.

    DeepSeek-V3   ``model.layers.61`` ...: one block a depth, a whole decoder layer each. ``h_k`` goes on as it is, and
                  through ``shared_head.norm`` to the output projection. The files also hold a copy of the embedding and
                  of the output projection, which are the model's own: written again from them on export.
    Nemotron-H    ``mtp.layers.0 ...``: one block of several layers (attention, then experts), used for every depth.
                  ``final_layernorm`` ends the block, also for the next depth.
Sources: arXiv:2412.19437, section 2.2, and its README_WEIGHTS.md; the key names of Nemotron 3 Super and Ultra.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.mixin import DistributedMixin
from transformers.masking_utils import create_causal_mask

from moe_recipes import families
from moe_recipes.config.errors import RecipeError
from moe_recipes.kernels.linear_cross_entropy import IGNORE_INDEX
from moe_recipes.moe.expert_load import count_only
from moe_recipes.runtime.optimizations import Optimization

ATTRIBUTE = "moe_recipes_mtp"


@dataclass(frozen=True, kw_only=True)
class Mtp:
    """The MTP blocks of a model, which own their parameters under the model's names."""

    blocks: list[list[nn.Module]]
    """Layers of the block of each depth; the same block may stand for several depths."""

    copies: dict[str, str]
    """Names under which a file repeats a tensor of the model -> that tensor's name."""

    loss_coef: float
    """The family's weight of their loss, where the recipe leaves it open."""

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def layers(self) -> list[nn.Module]:
        """Each layer once."""
        return list(dict.fromkeys(layer for block in self.blocks for layer in block))


def mtp_of(model: nn.Module) -> Mtp | None:
    """The model's MTP blocks, or None."""
    return getattr(model, ATTRIBUTE, None)


def count_blocks(config: Mapping[str, Any], names: Collection[str] | None) -> int:
    """How many MTP blocks a model has.

    Args:
        config: config.json.
        names: tensors in the checkpoint; None for random weights, which have what the config says.
    Raises:
        RecipeError: the checkpoint has MTP layers that do not make whole blocks, or other blocks than the config
            speaks of. None at all is no error: Transformers saves models without them.
    """
    family = families.family_of(config)
    mtp = family.mtp if family is not None else None
    if mtp is None:
        return 0
    if names is None:
        return mtp.num_blocks(config)
    numbers = (mtp.number_of(name, config) for name in names)
    first = int(config["num_hidden_layers"]) if mtp.after_layers else 0
    found = {number for number in numbers if number is not None}
    blocks, said = _whole_blocks(found, first=first, length=len(mtp.layers_of_block(config))), mtp.num_blocks(config)
    if blocks and said and blocks != said:
        raise RecipeError(
            f"model.source: its files have {blocks} multi-token-prediction blocks, its config.json speaks of {said};"
            " use the config.json that belongs to the weights"
        )
    return blocks


def _whole_blocks(found: set[int], *, first: int, length: int) -> int:
    blocks = len(found) // length
    if found != set(range(first, first + blocks * length)):
        raise RecipeError(
            f"model.source: its files have the multi-token-prediction layers {sorted(found)}, which are not whole"
            f" blocks of {length} from {first} on; use the config.json that belongs to the weights"
        )
    return blocks


@functools.cache
def _layer_class(decoder_layer: type[nn.Module]) -> type[nn.Module]:
    """A family's decoder layer that fuses its two inputs first, where it is the first of a block, and norms its output
    where it is the last. One class, so that FSDP2 gathers and recompute repeats all of it together."""

    class MtpLayer(decoder_layer):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, next_embeds: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            """The hidden states for the next layer or depth, and those for the output projection: ``[B, S, D]``."""
            if hasattr(self, "eh_proj"):
                both = torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1)
                hidden_states = self.eh_proj(both)
            hidden_states = super().forward(hidden_states, **options)
            if hasattr(self, "shared_head"):
                return hidden_states, self.shared_head["norm"](hidden_states)
            if hasattr(self, "final_layernorm"):
                hidden_states = self.final_layernorm(hidden_states)
            return hidden_states, hidden_states

    MtpLayer.__name__ = MtpLayer.__qualname__ = decoder_layer.__name__.replace("DecoderLayer", "MtpLayer")
    return MtpLayer


def _add_fusion(layer: nn.Module, norm: type[nn.Module], *, hidden: int, eps: float) -> None:
    layer.enorm, layer.hnorm = norm(hidden, eps=eps), norm(hidden, eps=eps)
    layer.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)


def _deepseek(model: PreTrainedModel, num_blocks: int, declared: families.Mtp) -> Mtp:
    config, layers = model.config, model.base_model.layers
    kind, norm = type(layers[-1]), type(model.base_model.norm)
    first, blocks, copies = config.num_hidden_layers, [], {}
    for index in range(first, first + num_blocks):
        layer = _layer_class(kind)(config, index)
        _add_fusion(layer, norm, hidden=config.hidden_size, eps=config.rms_norm_eps)
        layer.shared_head = nn.ModuleDict({"norm": norm(config.hidden_size, eps=config.rms_norm_eps)})
        layers.append(layer)  # the model's own forward stops at num_hidden_layers
        blocks.append([layer])
        copies |= {f"{declared.prefix}{index}.{name}": source for name, source in declared.copies}
    return Mtp(blocks=blocks, copies=copies, loss_coef=declared.loss_coef)


def _nemotron(model: PreTrainedModel, num_blocks: int, declared: families.Mtp) -> Mtp:
    config: PreTrainedConfig = copy.copy(model.config)
    kinds = list(config.mtp_layers_block_type) * num_blocks
    if unknown := set(kinds) - {"full_attention", "moe", "mlp"}:
        raise RecipeError(
            f"model.source: multi-token-prediction layers of the kind {min(unknown)!r} are not supported;"
            " remove them from a copy of the model"
        )
    config.layers_block_type = kinds
    kind, norm = type(model.base_model.layers[0]), type(model.base_model.norm_f)
    layers = nn.ModuleList(_layer_class(kind)(config, index) for index in range(len(kinds)))
    length = len(kinds) // num_blocks
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if getattr(module, "config", None) is config:
                module.config = model.config  # what is chosen later, such as the experts' computation, stands there
        if index % length == 0:
            _add_fusion(layer, norm, hidden=config.hidden_size, eps=config.layer_norm_epsilon)
        if index % length == length - 1:
            layer.final_layernorm = norm(config.hidden_size, eps=config.layer_norm_epsilon)
        experts = getattr(layer.mixer, "experts", None)
        if experts is not None:
            experts.moe_recipes_layer = model.config.num_hidden_layers + index
    model.mtp = nn.ModuleDict({"layers": layers})
    for plan in (model._ep_plan, model._fsdp_plan, model._tp_plan):
        inside = {name: style for name, style in (plan or {}).items() if name.startswith("model.layers.")}
        plan.update({name.replace("model.", "mtp.", 1): style for name, style in inside.items()})
    blocks = [list(layers[start : start + length]) for start in range(0, len(kinds), length)]
    depths = blocks * declared.reused_depth if num_blocks == 1 else blocks
    return Mtp(blocks=depths, copies={}, loss_coef=declared.loss_coef)


_BUILDERS = {"deepseek_v3": _deepseek, "nemotron_h": _nemotron}


def attach_mtp(model: PreTrainedModel, num_blocks: int, names: Collection[str] | None) -> None:
    """Give a model on the meta device its MTP blocks; before it is laid out over ranks and loaded.

    Args:
        names: tensors in the checkpoint, None for random weights. A repeated tensor is written again if it is there.
    """
    family = families.family_of(model.config.model_type)
    assert family is not None
    assert family.mtp is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            mtp = _BUILDERS[family.name](model, num_blocks, family.mtp)
    finally:
        torch.set_default_dtype(before)
    tied = model.all_tied_weights_keys or {}  # a tied output projection is saved as the embedding
    copies = {name: tied.get(source, source) for name, source in mtp.copies.items() if names is None or name in names}
    setattr(model, ATTRIBUTE, replace(mtp, copies=copies))
    ignored = {re.escape(name) for name in copies}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored


@contextmanager
def mtp_attached(config: Mapping[str, Any], names: Collection[str] | None) -> Iterator[None]:
    """While a model is built: give it its MTP blocks before Transformers distributes it, which it does to every model
    between building it on the meta device and loading or drawing its weights. Transformers has no other hook there.

    Args and errors: those of ``count_blocks``.
    """
    num_blocks = count_blocks(config, names)
    if not num_blocks:
        yield
        return
    original = DistributedMixin.__dict__["maybe_distribute_model"]

    def attach_first(cls: type, model: PreTrainedModel, *args: Any) -> Any:
        if mtp_of(model) is None:
            attach_mtp(model, num_blocks, names)
        return original.__func__(cls, model, *args)

    DistributedMixin.maybe_distribute_model = classmethod(attach_first)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DistributedMixin.maybe_distribute_model = original


def mtp_weight(model: nn.Module, coef: float | None) -> float:
    """The weight of the MTP loss that a recipe's ``coef`` means for this model."""
    mtp = mtp_of(model)
    if mtp is None:
        return 0.0
    return mtp.loss_coef if coef is None else coef


def choose_mtp(model: nn.Module, coef: float | None) -> tuple[float, Optimization]:
    """The weight of the MTP loss, and what to report; with weight 0 the blocks are frozen: no gradient, no state.

    Args:
        coef: the recipe's; None for the default where the model has such blocks.
    Raises:
        RecipeError: a weight for blocks that the model does not have.
    """
    mtp, name = mtp_of(model), "multi-token prediction"
    if mtp is None:
        if coef:
            raise RecipeError(
                f"train.mtp_loss_coef={coef}: the model has no multi-token-prediction layers; leave the key out"
            )
        return 0.0, Optimization(name, False, "the model has no such layers")
    weight = mtp_weight(model, coef)
    for layer in mtp.layers():
        layer.requires_grad_(weight != 0)
    if weight == 0:
        return 0.0, Optimization(name, False, "train.mtp_loss_coef is 0; kept and exported as it is")
    return weight, Optimization(name, True, f"depth {mtp.depth}, loss weight {weight:g}")


def _ahead(x_BS: Tensor, depth: int, fill: Any) -> Tensor:
    """Row t holds what was at t + depth; the last ``depth`` rows hold ``fill``."""
    tail = torch.full_like(x_BS[:, :depth], fill)
    return torch.cat([x_BS[:, depth:], tail], dim=1)


def same_document(position_ids_BS: Tensor, depth: int) -> Tensor:
    """bool ``[B, S]``: whether token t + depth belongs to the document of token t.

    Positions count up by one inside a document and start again in the next.
    """
    return _ahead(position_ids_BS, depth, -1) - position_ids_BS == depth


def mtp_labels(shift_labels_BS: Tensor, position_ids_BS: Tensor, depth: int) -> Tensor:
    """int64 ``[B, S]``: the token that position t predicts at this depth, t + depth + 1; -100 where there is none."""
    labels_BS = _ahead(shift_labels_BS, depth, IGNORE_INDEX)
    return labels_BS.where(same_document(position_ids_BS, depth), IGNORE_INDEX)


def mtp_hidden_states(
    model: PreTrainedModel, hidden_BSD: Tensor, embeds_BSD: Tensor, position_ids_BS: Tensor | None
) -> list[Tensor]:
    """Hidden states for the output projection, one ``[B, S, D]`` a depth. Inside the model's own call.

    Args:
        hidden_BSD: the model's last hidden state, after its norm.
        embeds_BSD: embeddings of the input tokens.
        position_ids_BS: as the model got them; None for rows of one document.
    """
    mtp = mtp_of(model)
    assert mtp is not None
    positions = whole_row_positions(embeds_BSD) if position_ids_BS is None else position_ids_BS
    mask = create_causal_mask(
        config=model.config, inputs_embeds=embeds_BSD, attention_mask=None, cache=None, position_ids=positions
    )
    rotary = getattr(model.base_model, "rotary_emb", None)
    options: dict[str, Any] = {"position_ids": positions}
    if rotary is not None:
        options["position_embeddings"] = rotary(embeds_BSD, positions)
    found = []
    for depth, block in enumerate(mtp.blocks, start=1):
        # Zeros and not the next document's token: what such a position computes reaches no loss and counts in no load,
        # but it is routed.
        inside = same_document(positions, depth)[..., None]
        next_BSD = F.pad(embeds_BSD[:, depth:], (0, 0, 0, depth)).masked_fill(~inside, 0)
        with count_only(inside[..., 0].expand(hidden_BSD.shape[:2])):
            for layer in block:
                hidden_BSD, out_BSD = layer(hidden_BSD, next_BSD, attention_mask=mask, **options)
        found.append(out_BSD)
    return found


def whole_row_positions(x_BS: Tensor) -> Tensor:
    """0, 1, 2 ... ``[1, S]``: positions of rows that hold one document each."""
    return torch.arange(x_BS.shape[1], device=x_BS.device)[None]
