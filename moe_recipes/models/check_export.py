"""Is an export what it should be? ``python -m moe_recipes.models.check_export RUN_DIR``, in one process.

Loads ``RUN/export`` with plain Transformers, Mamba's time step limited as the config says, compares its logits with
those that the trainer left in ``RUN/export_probe.safetensors``, and generates a line of text where it has a
tokenizer. The trainer runs it with ``--export`` and ``--json`` before an export takes its place.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from moe_recipes.config.errors import DoesNotFitError, MissingInputError, MoeRecipesError, NotFiniteError
from moe_recipes.families import family_of
from moe_recipes.models.exporting.reload import needed_bytes, stored_bytes
from moe_recipes.models.time_step import honour_time_step_limit
from moe_recipes.runtime.host_memory import free_bytes
from moe_recipes.runtime.safetensors_file import read_layout

logger = logging.getLogger("moe_recipes")
PROBE = "export_probe.safetensors"
QUESTION = "What does json.dumps do?"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far the reloaded model may be from the trained one."""

    largest_difference: float
    """Of a logit, over the largest logit."""

    mean_kl: float
    """Kullback-Leibler divergence of the reloaded distributions from the trained ones, nats, mean over positions."""


BOUNDS = {
    torch.float32: Bounds(largest_difference=1e-4, mean_kl=1e-6),
    torch.bfloat16: Bounds(largest_difference=0.25, mean_kl=0.05),
}
"""bfloat16 rounds differently in every order of a sum, which may also send a token to another expert: one logit says
little then, the mean divergence much."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Logits of the reloaded model against the trainer's, over all positions of all prompts."""

    prompts: int
    tokens: int
    largest_difference: float
    """Over the largest logit."""

    mean_kl: float
    """Nats."""

    largest_kl: float
    same_top_token: float
    """Share of the positions."""


def read_probe(run_dir: Path) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """The trainer's tokens and logits, and the dtype that it computed in.

    Raises:
        MissingInputError: the run left none.
    """
    path = run_dir / PROBE
    if not path.is_file():
        raise MissingInputError(f"{run_dir}: no finished export; export the run with `moe-recipes export {run_dir}`")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("input_ids", "logits")}
        return tensors, getattr(torch, file.metadata()["dtype"])


def bounds_of(export: Path, dtype: torch.dtype) -> Bounds:
    """The bounds for a model that was trained in ``dtype``; those of bfloat16 also where a tensor was rounded to it."""
    kinds = {place.dtype for path in export.glob("*.safetensors") for place in read_layout(path).places.values()}
    rounded = kinds & {torch.bfloat16, torch.float16}
    return BOUNDS[torch.bfloat16 if rounded else dtype]


def compare_logits(logits: torch.Tensor, want: torch.Tensor) -> Agreement:
    """Both ``[B, S, vocabulary]``. One prompt after the other, as float64 takes four times the memory of bfloat16."""
    difference, largest, kls, same = 0.0, float(want.abs().max()), [], 0
    for got_SV, want_SV in zip(logits, want, strict=True):
        difference = max(difference, float((got_SV.float() - want_SV.float()).abs().max().nan_to_num(float("inf"))))
        trained, reloaded = want_SV.double().log_softmax(-1), got_SV.double().log_softmax(-1)
        kls.append((trained.exp() * (trained - reloaded)).sum(-1).clamp_min(0).nan_to_num(float("inf")))
        same += int((got_SV.argmax(-1) == want_SV.argmax(-1)).sum())
    kl = torch.cat(kls)
    return Agreement(
        prompts=len(want),
        tokens=kl.numel(),
        largest_difference=difference / largest,
        mean_kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        same_top_token=same / kl.numel(),
    )


def accept(export: Path, found: Agreement, bounds: Bounds) -> None:
    """
    Raises:
        NotFiniteError: a bound is passed.
    """
    if not found.largest_difference <= bounds.largest_difference:
        raise NotFiniteError(
            f"{export}: logits differ from the trained model's by {found.largest_difference:.1e} of the largest;"
            f" allowed: {bounds.largest_difference:.0e}"
        )
    if not found.mean_kl <= bounds.mean_kl:
        raise NotFiniteError(
            f"{export}: tokens are distributed otherwise than by the trained model, KL {found.mean_kl:.1e} nats a"
            f" position; allowed: {bounds.mean_kl:.0e}"
        )


def load(export: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The export in plain Transformers.

    Raises:
        DoesNotFitError: this host has not the memory for it.
        NotFiniteError: a tensor is missing, too many, or of another shape.
    """
    needed, free = needed_bytes(stored_bytes(export)), free_bytes()
    if needed > free:
        raise DoesNotFitError(
            f"{export}: loading it needs {needed / 2**30:,.1f} GiB of host memory, {free / 2**30:,.1f} GiB are free;"
            f" run this on a larger host, or trust the checksums of EXPORT.json"
        )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=dtype, output_loading_info=True)
    family, config = family_of(model.config.model_type), model.config.to_dict()
    mtp = family.mtp if family is not None else None
    extra = {key for key in info["unexpected_keys"] if mtp is not None and mtp.number_of(key, config) is not None}
    info["unexpected_keys"] = set(info["unexpected_keys"]) - extra  # Transformers has no model for these layers
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise NotFiniteError(
            f"{export}: plain Transformers does not find its weights: {wrong[0]} ({len(wrong)} tensors)"
        )
    honour_time_step_limit(model)  # which plain Transformers ignores and the trainer does not
    return model


def check(run_dir: Path, export: Path) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The reloaded model, and how it agrees with the trainer: ``logits`` and ``engine``.

    Raises:
        MissingInputError, DoesNotFitError, NotFiniteError: no export, too large for this host, or another model.
    """
    probe, dtype = read_probe(run_dir)
    model = load(export, dtype)
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"].to(model.device), use_cache=False).logits.cpu()
    found, bounds = compare_logits(logits, probe["logits"]), bounds_of(export, dtype)
    accept(export, found, bounds)
    engine = {"version": transformers.__version__, "dtype": str(model.dtype), "device": str(model.device)}
    return model, {"logits": {**asdict(found), "bounds": asdict(bounds)}, "engine": engine}


def generate_line(export: Path, model: transformers.PreTrainedModel, question: str) -> str:
    """The model's greedy answer to a question, as one line."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.models.check_export")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--export", type=Path, help="the exported folder; RUN_DIR/export if not given")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write what was found to this file, generate nothing")
    options = parser.parse_args()
    run_dir, export = options.run_dir, options.export or options.run_dir / "export"
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        model, found = check(run_dir, export)
        if options.json:
            options.json.write_text(json.dumps(found))
            return 0
        logger.info(
            "export: loads in plain Transformers; logits differ by %.1e of the largest, KL %.1e nats",
            found["logits"]["largest_difference"], found["logits"]["mean_kl"],
        )  # fmt: skip
        if (export / "tokenizer.json").is_file():
            logger.info("export: %s -> %s", QUESTION, generate_line(export, model, QUESTION))
    except MoeRecipesError as error:
        logger.error("moe-recipes: error: %s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
