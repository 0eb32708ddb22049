"""The step in one process of eager Transformers, float32, one document at a time: nothing of this package computes.

One thing is corrected: Transformers' Nemotron-H clamps Mamba's time step at ``time_step_min`` and not at the config's
``time_step_limit``, so the limit is set.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from moe_recipes.data.loader import IGNORE
from moe_recipes.prove.examples import NUM_MICROBATCHES, NUM_ROWS, ROWS_PER_MICROBATCH, SEQ_LEN, Document
from moe_recipes.prove.mtp import ReferenceMtp, load_blocks


def honour_time_step_limit(model: nn.Module) -> None:
    """Give Mamba layers of Transformers the limit of their config."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(float(value) for value in model.config.time_step_limit)


def load_plain(folder: Path) -> nn.Module:
    """Transformers' own model of a folder, eager, float32, in training mode."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    honour_time_step_limit(model)
    return model.train()


def gradients_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Take the gradients by name, of those that have one, and clear them. A family may have parameters that none
    reaches, such as those of an index by which tokens are chosen: an optimizer leaves these alone."""
    found = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def cross_entropy(
    model: nn.Module, documents: Sequence[Document], *, mtp: ReferenceMtp | None, mtp_coef: float
) -> dict[str, Any]:
    """Logits ``[rows, S, V]``, mean loss over all label tokens, that of multi-token prediction, and the gradient of
    their sum by every parameter, the second times ``mtp_coef``."""
    num_labels = sum(int(d.learned.sum()) for d in documents)
    logits_RSV = torch.zeros(NUM_ROWS, SEQ_LEN, model.config.get_text_config().vocab_size)
    total = mtp_total = 0.0
    hidden: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0][0]))
    for d in documents:
        logits = model(input_ids=d.input_ids[None], use_cache=False).logits[0]
        logits_RSV[d.row, d.start : d.end] = logits.detach()
        labels = torch.where(d.learned, d.input_ids, IGNORE)[1:]
        loss = F.cross_entropy(logits[:-1], labels, ignore_index=IGNORE, reduction="sum") / num_labels
        total += float(loss.detach())
        if mtp is not None and mtp_coef:
            ahead = mtp.loss(d, hidden[-1]) / num_labels
            mtp_total += float(ahead.detach())
            loss = loss + mtp_coef * ahead
        loss.backward()
        hidden.clear()
    hook.remove()
    found = {
        "logits": logits_RSV,
        "loss": total,
        "num_labels": num_labels,
        "gradients": gradients_of(model.named_parameters()),
    }
    if mtp is not None and mtp_coef:
        found["mtp"] = mtp_total
        found["gradients"] |= gradients_of(mtp.weights.items())
    return found


def load_balancing(model: nn.Module, documents: Sequence[Document], *, rows: int) -> dict[str, Any]:
    """Transformers' load-balancing loss, the mean over groups of ``rows`` rows, and its gradient.

    A group is what one rank sees at once, so the loss depends on how the rows are dealt out.
    """
    config = model.config.get_text_config()
    loss_of: Callable[..., Any] = sys.modules[type(model).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
    groups = NUM_ROWS // rows
    total = 0.0
    for first in range(0, NUM_ROWS, rows):
        layers: dict[int, list[Tensor]] = defaultdict(list)
        for d in documents:
            if first <= d.row < first + rows:
                out = model(input_ids=d.input_ids[None], use_cache=False, output_router_logits=True)
                for layer, logits in enumerate(out.router_logits):
                    layers[layer].append(logits)
        logits = tuple(torch.cat(layers[layer]) for layer in sorted(layers))
        loss = loss_of(logits, logits[0].shape[-1], config.num_experts_per_tok) / groups
        loss.backward()
        total += float(loss.detach())
    return {"loss": total, "gradients": gradients_of(model.named_parameters())}


def has_load_balancing(model: nn.Module) -> bool:
    """Whether Transformers defines the loss for this family."""
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def count_tokens(experts: Sequence[nn.Module]) -> list[Tensor]:
    """Tensors ``[E]`` that count, from now on, the tokens which each expert of each block is given."""
    counts = []
    for module in experts:
        count = torch.zeros(module.down_proj.shape[0], dtype=torch.int64)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: Tensor = count) -> None:
            chosen = (kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]).flatten()
            count += torch.bincount(chosen, minlength=len(count))

        module.register_forward_pre_hook(hook, with_kwargs=True)
        counts.append(count)
    return counts


def norm_of(gradients: dict[str, Tensor]) -> float:
    """The global norm: every element of every parameter counts once."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def reference_step(
    weights: dict[str, Tensor], gradients: dict[str, Tensor], *, clip: float, lr: float, eps: float,
    betas: tuple[float, float], weight_decay: float,
) -> dict[str, Any]:  # fmt: skip
    """Clip and step with torch's own AdamW: ``weights`` after it by name, and both ``moments`` by theirs.

    Matrices decay; vectors and biases, also those of experts, do not.
    """
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    if clip:
        nn.utils.clip_grad_norm_(parameters.values(), clip)
    plain = [p for name, p in parameters.items() if p.ndim <= 1 or name.endswith("bias")]
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and not name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps)
    optimizer.step()
    state = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return {
        "weights": {name: parameter.detach() for name, parameter in parameters.items()},
        "moments": {key: {name: state[name][key] for name in parameters} for key in ("exp_avg", "exp_avg_sq")},
    }


def write_reference(
    weights: Path, documents: Sequence[Document], out: Path, *, experts_of: Callable[[nn.Module], list[nn.Module]],
    aux_loss: bool, mtp_coef: float,
) -> None:  # fmt: skip
    """Everything above, for the model of a folder, to one file.

    Args:
        experts_of: finds the experts modules of a model, in the order of its layers.
        aux_loss: also the load-balancing loss, for each way to deal the rows out.
        mtp_coef: weight of the loss of multi-token prediction, where the folder has such blocks; 0: they are frozen.
    """
    model = load_plain(weights)
    mtp = load_blocks(model, weights)
    parameters = dict(model.named_parameters()) | (mtp.weights if mtp is not None else {})
    weights_before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    counted = [model, *([mtp.layers] if mtp is not None and mtp_coef else [])]
    counts = count_tokens([experts for module in counted for experts in experts_of(module)])
    result = cross_entropy(model, documents, mtp=mtp, mtp_coef=mtp_coef)
    result["counts"] = [count.clone() for count in counts]
    buffers = dict(model.named_buffers()) | (mtp.buffers if mtp is not None else {})
    result["buffers"] = {name: buffer.clone() for name, buffer in buffers.items()}
    result["aux"] = {}
    size = ROWS_PER_MICROBATCH
    while aux_loss and size:
        result["aux"][size] = load_balancing(model, documents, rows=size)
        size //= 2
    trained = result["gradients"].keys() | {name for aux in result["aux"].values() for name in aux["gradients"]}
    result["weights"] = {name: weight for name, weight in weights_before.items() if name in trained}
    result["frozen"] = {name: weight for name, weight in weights_before.items() if name not in trained}
    assert NUM_ROWS == NUM_MICROBATCHES * ROWS_PER_MICROBATCH
    torch.save(result, out)
