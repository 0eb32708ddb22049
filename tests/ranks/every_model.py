"""The walk over every model of Transformers with an expert-parallel plan: our door on two ranks against one process.

``python -m tests.ranks.every_model --write`` walks all of them and writes the table of ``docs/every-model.md``; with
names of model types it walks only those and prints their lines.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.distributed import DistributedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_recipes import AutoModelForCausalLM
from moe_recipes.models.auto import enable_activation_checkpointing
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.models.loss import why_not_fused
from moe_recipes.models.packing import why_not_packed
from moe_recipes.prove.compare import distances, relative_error, whole
from moe_recipes.prove.reference import honour_time_step_limit, norm_of
from moe_recipes.prove.weights import boost
from tests.ranks.launch import RanksFailedError, run_on_ranks
from tests.small_configs import plan_bearing, small

ROWS, SEQ_LEN = 4, 24
"""Two rows for each of two ranks; as long as three of the short attention windows."""

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
NOISE_FLOOR = 1e-6
"""Over the global norm: a gradient below it is rounding noise, such as that of a bias which a softmax cancels."""

ROUTER_KEPT = "router kept under recomputation"
PASSES, EAGER_FAILS, NO_CAUSAL_LM = "passes", "fails in eager Transformers", "No causal language model"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "every-model.md"
HEAD = "| model type | class | logits and gradients | documents share rows | fused loss | router runs once |"
RULE = "| --- | --- | --- | --- | --- | --- |"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the walk found of one model type."""

    model_type: str
    outcome: str
    model_class: str = ""
    packing: bool = False
    """Documents may share a row."""

    fused_loss: bool = False
    router_kept: bool = False
    """The router runs once a step, also where layers are recomputed."""


def rows_of() -> Tensor:
    """int64 ``[ROWS, SEQ_LEN]``, tokens that every small vocabulary has."""
    return torch.randint(0, 256, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def mean_loss(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())


def write_reference(model_type: str, folder: Path) -> None:
    """Boosted weights, and logits and gradients of all rows in this one process of eager Transformers."""
    _be_quiet()
    model = transformers.AutoModelForCausalLM.from_config(
        small(model_type), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    boost(model)
    if model_type == "nemotron_h":
        honour_time_step_limit(model)
    model.train()
    shares = []
    for block in moe_blocks(model):
        block.experts.register_forward_pre_hook(
            lambda module, args, kwargs: shares.append(
                (kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]).shape[-1] / module.num_experts
            ),
            with_kwargs=True,
        )
    ids = rows_of()
    logits = model(input_ids=ids, use_cache=False).logits
    mean_loss(logits, ids).backward()
    assert shares, "the small model has no experts"
    assert max(shares) <= 0.5, "every expert gets every token: nothing is routed"
    assert torch.isfinite(logits).all(), "the small model's logits are not finite"
    gradients = {name: _or_zeros(parameter) for name, parameter in model.named_parameters()}
    model.save_pretrained(folder / "weights")
    facts = {"class": type(model).__name__, "logits": logits.detach(), "gradients": gradients}
    torch.save(facts, folder / "reference.pt")


def _or_zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def through_the_door(folder: Path) -> None:
    """On two ranks: load with ``ep_size`` 2, and hold logits, every gradient, those of a recomputed pass, and what
    ``save_pretrained`` writes against the reference."""
    _be_quiet()
    reference = torch.load(folder / "reference.pt")
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder / "weights", dtype=torch.float32, distributed_config=layout)
    model.train()
    rank, size = dist.get_rank(), ROWS // dist.get_world_size()
    mine = slice(rank * size, (rank + 1) * size)
    problems = _compare(model, rows_of()[mine], reference["logits"][mine], reference["gradients"])
    if model.supports_gradient_checkpointing:
        enable_activation_checkpointing(model)
        found = _compare(model, rows_of()[mine], reference["logits"][mine], reference["gradients"])
        problems += [f"recomputed: {problem}" for problem in found]
    not_kept = [o.reason for o in model.moe_recipes_optimizations if o.name == ROUTER_KEPT and not o.applied]
    facts = {"packing": why_not_packed(model) is None, "fused_loss": why_not_fused(model) is None}
    tied = dict(model.all_tied_weights_keys)
    model.save_pretrained(folder / "saved")
    everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, problems)
    if rank == 0:
        problems = [problem for own in everyones for problem in own] + _saved(folder, tied)
        facts |= {"problems": problems, "router_kept": not not_kept}
        (folder / "door.json").write_text(json.dumps(facts))


def _be_quiet() -> None:
    logging.getLogger("moe_recipes").setLevel(logging.ERROR)
    # Gathering an expert's shards for the comparison is slow and warns of it; a step never does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _compare(model: nn.Module, ids: Tensor, logits: Tensor, gradients: dict[str, Tensor]) -> list[str]:
    """One forward and backward pass of this rank's rows; what differs from the reference."""
    model.zero_grad(set_to_none=True)
    got = model(input_ids=ids, use_cache=False).logits
    mean_loss(got, ids).backward()
    problems = []
    if (error := relative_error(got, logits)) > LOGITS_TOLERANCE:
        problems.append(f"logits differ by {error:.1e}")
    floor = NOISE_FLOOR * norm_of(gradients)
    mine = {name: whole(_or_zeros(parameter)) for name, parameter in model.named_parameters()}
    error, name = distances(mine, gradients, floor=floor)[0]
    if error > GRADIENT_TOLERANCE:
        problems.append(f"gradient of {name} differs by {error:.1e}")
    return problems


def _saved(folder: Path, tied: dict[str, str]) -> list[str]:
    """What ``save_pretrained`` of the sharded model wrote otherwise than that of one process. A tied tensor may stand
    there twice: Transformers finds ties by address, which shards do not share."""
    found, wanted = (
        {key: tensor for path in (folder / place).glob("*.safetensors") for key, tensor in load_file(path).items()}
        for place in ("saved", "weights")
    )
    wanted |= {copy: wanted[source] for copy, source in tied.items() if copy in found and source in wanted}
    wrong = sorted(key for key in found.keys() | wanted.keys() if not _same(found.get(key), wanted.get(key)))
    return [f"saved {wrong[0]} otherwise ({len(wrong)} tensors)"] if wrong else []


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def walk(model_type: str, folder: Path) -> Found:
    """Everything about one model type, in processes of its own."""
    if CONFIG_MAPPING[model_type] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return Found(model_type=model_type, outcome=NO_CAUSAL_LM)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_on_ranks(write_reference, 1, model_type, folder)
    except RanksFailedError as error:
        return Found(model_type=model_type, outcome=f"{EAGER_FAILS}: {error.cause}")
    found = Found(model_type=model_type, outcome=PASSES, model_class=torch.load(folder / "reference.pt")["class"])
    try:
        run_on_ranks(through_the_door, 2, folder)
    except RanksFailedError as error:
        print(error, file=sys.stderr)
        return replace(found, outcome=f"fails: {error.cause}")
    facts = json.loads((folder / "door.json").read_text())
    if problems := facts.pop("problems"):
        return replace(found, outcome=f"differs: {'; '.join(problems)}")
    return replace(found, **facts)


def row_of(found: Found) -> str:
    """The model type's line of the table."""
    yes = [{True: "yes", False: "no"}[value] for value in (found.packing, found.fused_loss, found.router_kept)]
    return f"| {found.model_type} | {found.model_class} | {found.outcome} | {' | '.join(yes)} |"


def pages_rows() -> tuple[dict[str, str], list[str]]:
    """The table of the page by model type, and the model types that the page lists as having no causal LM."""
    lines = PAGE.read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines[lines.index(HEAD) + 2 :] if line.startswith("| ")}
    listed = next(line for line in lines if line.startswith(NO_CAUSAL_LM))
    return rows, [word.strip(" .") for word in listed.partition(":")[2].split(",")]


def write_page(found: Sequence[Found]) -> None:
    """Put the table and the list below it in place of those of the page."""
    above = PAGE.read_text().partition(HEAD)[0]
    rows = [row_of(one) for one in found if one.outcome != NO_CAUSAL_LM]
    none = ", ".join(one.model_type for one in found if one.outcome == NO_CAUSAL_LM)
    PAGE.write_text(above + "\n".join([HEAD, RULE, *rows, "", f"{NO_CAUSAL_LM}: {none}.", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="default: every one")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}, of all")
    options = parser.parse_args()
    if options.write and options.model_types:
        parser.error("--write is for all model types")
    found = []
    for model_type in options.model_types or plan_bearing():
        with tempfile.TemporaryDirectory() as folder:
            found.append(walk(model_type, Path(folder)))
            print(row_of(found[-1]), flush=True)
    if options.write:
        write_page(found)


if __name__ == "__main__":
    main()
