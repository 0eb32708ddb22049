"""The trainer's loss: summed over label tokens, computed inside the model's own call.

FSDP2 gathers the output projection only while the root module's ``__call__`` runs, so the loss has to be computed
there. ``install_loss`` gives the model instance a forward that returns the summed loss instead of logits.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_recipes.config.errors import RecipeError
from moe_recipes.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropies
from moe_recipes.models.blocks import forward_source, moe_blocks
from moe_recipes.models.mtp import mtp_hidden_states, mtp_labels, whole_row_positions
from moe_recipes.moe.balance import CORRECTION_BIAS, load_balancing_loss, router_z_loss
from moe_recipes.moe.expert_load import counted_tokens
from moe_recipes.runtime.optimizations import Optimization

_PLAIN = {
    "hidden_states": {
        "outputs.last_hidden_state",
        "outputs[0]",
        "slice_logits_to_keep(hidden_states, logits_to_keep)",
    },
    "logits": {
        "self.lm_head(hidden_states)",
        "self.lm_head(hidden_states).float()",
        "self.lm_head(hidden_states.to(self.lm_head.weight.dtype)).float()",
    },
}
"""All that a forward may assign to these names and still be a plain output projection of the last hidden state."""


def why_not_fused(model: PreTrainedModel) -> str | None:
    """None if the model's logits are exactly its output projection of the last hidden state, else the reason.

    Read from the source of its forward: a family that scales or caps hidden states or logits assigns them otherwise.
    """
    head = model.get_output_embeddings()
    if model.base_model is model or not isinstance(head, nn.Linear) or head is not getattr(model, "lm_head", None):
        return "the model has no lm_head over a base model"
    projected, forward = False, forward_source(model)
    for node in ast.walk(forward) if forward is not None else ():
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = target.id if isinstance(target, ast.Name) else ""
            value = ast.unparse(node.value)
            projected = projected or name == "logits"
            if name in _PLAIN and (isinstance(node, ast.AugAssign) or value not in _PLAIN[name]):
                return f"its forward has `{name} = {value}`"
    return None if projected else "its forward assigns no `logits`"


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the trainer's loss holds besides the cross-entropy."""

    aux_loss: bool = False
    """The load-balancing loss."""

    z_loss: bool = False
    """The router z-loss."""

    mtp_coef: float = 0.0
    """Weight of the multi-token-prediction loss; 0 runs no such block."""

    @property
    def router_logits(self) -> bool:
        return self.aux_loss or self.z_loss


class Losses(NamedTuple):
    """Losses of one microbatch on one rank: float32 scalars. ``total`` has the gradients of all cross-entropies."""

    total: Tensor
    """Sum of the cross-entropies of the label tokens, and ``mtp_coef`` times ``mtp`` where that is wanted."""

    label: Tensor
    """Sum of the cross-entropies of the label tokens alone. No gradient where ``mtp`` is there."""

    mtp: Tensor | None = None
    """Summed cross-entropy of the tokens further ahead, mean over the depths. No gradient."""

    aux: Tensor | None = None
    """Load-balancing loss, with its gradient, before its coefficient."""

    z: Tensor | None = None
    """Router z-loss, with its gradient, before its coefficient."""


def _router_losses(model: PreTrainedModel, outputs: object, wanted: Wanted) -> dict[str, Tensor]:
    if not wanted.router_logits:
        return {}
    name, logits = type(model).__name__.removeprefix("FSDP"), getattr(outputs, "router_logits", None)
    if not logits:
        key = "router_aux_loss_coef" if wanted.aux_loss else "router_z_loss_coef"
        raise RecipeError(f"train.{key}: {name} gives no router logits; set it to 0")
    found = {}
    if wanted.aux_loss:
        top_k = model.config.get_text_config().num_experts_per_tok
        found["aux"] = load_balancing_loss(logits, top_k=top_k, real_T=counted_tokens())
    if wanted.z_loss:
        found["z"] = router_z_loss(logits, real_T=counted_tokens())
    return found


def _check_aux_loss(model: PreTrainedModel) -> None:
    """Refuse the load-balancing loss for families for which Transformers defines none: it reads a softmax of the
    logits, and a router that chooses otherwise would be pulled elsewhere.

    Raises:
        RecipeError: names the switch that balances such routers, where there is one.
    """
    forward = forward_source(model)
    if forward is not None and "load_balancing_loss_func" in ast.unparse(forward):
        return
    biased = any(hasattr(block.router, CORRECTION_BIAS) for block in moe_blocks(model))
    raise RecipeError(
        f"train.router_aux_loss_coef: Transformers' {type(model).__name__.removeprefix('FSDP')} has no load-balancing"
        f" loss; set it to 0{' and balance by train.router_bias_update_rate' if biased else ''}"
    )


def install_loss(
    model: PreTrainedModel, *, fused: bool, chunk_tokens: int, wanted: Wanted | None = None
) -> Optimization:
    """Make ``model(input_ids=, position_ids=, shift_labels=)`` return its ``Losses``.

    ``shift_labels`` [B, S] int64 holds the label of the next token, -100 where there is none. In evaluation only the
    cross-entropy is computed. ``remove_loss`` undoes it.

    Raises:
        RecipeError: the model's family has no such loss.
    """
    wanted = wanted or Wanted()
    if wanted.aux_loss:
        _check_aux_loss(model)
    reason = "kernels.loss is 'logits'" if not fused else why_not_fused(model)
    plain_forward = model.forward
    if wanted.mtp_coef and (unusual := why_not_fused(model)):
        raise RecipeError(f"train.mtp_loss_coef: {unusual}, which its blocks would not repeat; set it to 0")

    def options(now: Wanted) -> dict[str, bool]:
        return {"use_cache": False} | ({"output_router_logits": True} if now.router_logits else {})

    def from_logits(*, input_ids: Tensor, shift_labels: Tensor, **inputs: Tensor) -> Losses:
        now = wanted if model.training else Wanted()
        outputs = plain_forward(input_ids=input_ids, **options(now), **inputs)
        loss = _cross_entropy(outputs.logits.flatten(0, 1), shift_labels.flatten())
        return Losses(total=loss, label=loss, **_router_losses(model, outputs, now))

    def from_hidden(*, input_ids: Tensor, shift_labels: Tensor, **inputs: Tensor) -> Losses:
        now = wanted if model.training else Wanted()
        # The blocks further ahead need the embeddings too, and under FSDP2 a second look-up would gather them again.
        embeds = model.get_input_embeddings()(input_ids) if now.mtp_coef else None
        first = {"input_ids": input_ids} if embeds is None else {"inputs_embeds": embeds}
        outputs = model.base_model(**first, **options(now), **inputs)
        hidden, labels, factors = [outputs[0]], [shift_labels], [1.0]
        if embeds is not None:
            positions = inputs.get("position_ids")
            hidden += mtp_hidden_states(model, outputs[0], embeds, positions)
            positions = whole_row_positions(input_ids) if positions is None else positions
            labels += [mtp_labels(shift_labels, positions, depth) for depth in range(1, len(hidden))]
            factors += [now.mtp_coef / (len(hidden) - 1)] * (len(hidden) - 1)
        total, losses = _projected(
            model, hidden, labels, factors, chunk_tokens=None if reason is not None else chunk_tokens
        )
        extra = _router_losses(model, outputs, now)
        if embeds is None:
            return Losses(total=total, label=total, **extra)
        return Losses(total=total, label=losses[0], mtp=losses[1:].mean(), **extra)

    model.forward = from_logits if reason and not wanted.mtp_coef else from_hidden  # type: ignore[method-assign]
    name = "fused linear cross-entropy"
    return Optimization(name, not reason, reason or f"chunks of {chunk_tokens} tokens, logits never whole")


def _cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def _projected(
    model: PreTrainedModel,
    hidden: list[Tensor],
    labels: list[Tensor],
    factors: list[float],
    *,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """Total and each loss of several hidden states in one call of the output projection: FSDP2 gathers its weight and
    reduces its gradient around a call. ``chunk_tokens`` None: with whole logits."""
    head = model.get_output_embeddings()
    parts = [(each.shape[0] * each.shape[1], factor) for each, factor in zip(hidden, factors, strict=True)]
    labels_T = torch.cat([each.flatten() for each in labels])

    def head_forward(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        if chunk_tokens is not None:
            return linear_cross_entropies(
                hidden_TD, head.weight, labels_T, bias_V=head.bias, chunk_tokens=chunk_tokens, parts=parts
            )
        rows = [count for count, _ in parts]
        logits = F.linear(hidden_TD, head.weight, head.bias).split(rows)
        losses = torch.stack(
            [_cross_entropy(each, own) for each, own in zip(logits, labels_T.split(rows), strict=True)]
        )
        return (losses * losses.new_tensor(factors)).sum(), losses.detach()

    flat = [each.flatten(0, 1).to(head.weight.dtype) for each in hidden]
    with _forward_replaced(head, head_forward):
        return head(flat[0] if len(flat) == 1 else torch.cat(flat))


def remove_loss(model: PreTrainedModel) -> None:
    """Give the model its own forward back."""
    del model.forward
