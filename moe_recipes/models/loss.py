"""The trainer's loss: summed over label tokens, computed inside the model's own call.

FSDP2 gathers the output projection only while the root module's ``__call__`` runs, so the loss has to be computed
there. ``install_loss`` gives the model instance a forward that returns the summed loss instead of logits.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_recipes.config.errors import RecipeError
from moe_recipes.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from moe_recipes.models.blocks import forward_source
from moe_recipes.moe.balance import load_balancing_loss
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
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _aux_loss(model: PreTrainedModel, outputs: object, *, wanted: bool) -> Tensor | None:
    if not wanted:
        return None
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise RecipeError(
            f"train.router_aux_loss_coef: {type(model).__name__.removeprefix('FSDP')} gives no router logits;"
            " set it to 0"
        )
    return load_balancing_loss(logits, top_k=model.config.get_text_config().num_experts_per_tok)


def install_loss(model: PreTrainedModel, *, fused: bool, chunk_tokens: int, aux_loss: bool = False) -> Optimization:
    """Make ``model(input_ids=, position_ids=, shift_labels=)`` return the summed cross-entropy, a float32 scalar.

    With ``aux_loss`` it returns that and the load-balancing loss of these tokens. ``shift_labels`` [B, S] int64 holds
    the label of the next token, -100 where there is none. ``remove_loss`` undoes it.
    """
    reason = "kernels.loss is 'logits'" if not fused else why_not_fused(model)
    plain_forward = model.forward
    options = {"use_cache": False, "output_router_logits": True} if aux_loss else {"use_cache": False}

    def from_logits(*, input_ids: Tensor, shift_labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = plain_forward(input_ids=input_ids, **options, **inputs)
        logits, labels = outputs.logits.float(), shift_labels.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, _aux_loss(model, outputs, wanted=aux_loss)

    def from_hidden(*, input_ids: Tensor, shift_labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = model.base_model(input_ids=input_ids, **options, **inputs)
        head = model.get_output_embeddings()

        def head_forward(hidden_TD: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden_TD, head.weight, shift_labels.flatten(), bias_V=head.bias, chunk_tokens=chunk_tokens
            )

        # Through the projection's own call, so that FSDP2 gathers its weight and reduces its gradient.
        with _forward_replaced(head, head_forward):
            loss = head(outputs[0].flatten(0, 1).to(head.weight.dtype))
        return loss, _aux_loss(model, outputs, wanted=aux_loss)

    model.forward = from_logits if reason else from_hidden  # type: ignore[method-assign]
    name = "fused linear cross-entropy"
    return Optimization(name, not reason, reason or f"chunks of {chunk_tokens} tokens, logits never whole")


def remove_loss(model: PreTrainedModel) -> None:
    """Give the model its own forward back."""
    del model.forward
