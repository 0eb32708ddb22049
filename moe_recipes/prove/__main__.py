"""The proof: ``python -m moe_recipes.prove FOLDER --recipe-json JSON``. The verb ``prove`` starts it.

This process only imports torch and forks: one process for the reference, then 1, 2, 4 and 8 ranks, one after another.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moe_recipes.config.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    CannotWriteError,
    MoeRecipesError,
    NotFiniteError,
    RecipeError,
    first_line,
)
from moe_recipes.config.recipe import Parallel, Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import write_json
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.models.build import load_config, read_source
from moe_recipes.models.mtp import attach_mtp, count_blocks, mtp_of
from moe_recipes.models.mtp_kept import keep_frozen
from moe_recipes.models.packing import why_not_packed
from moe_recipes.prove.checks import prove_layout
from moe_recipes.prove.examples import make_documents
from moe_recipes.prove.ranks import RanksFailedError, run_on_ranks
from moe_recipes.prove.reference import has_load_balancing, write_reference
from moe_recipes.prove.report import report_lines, say_error
from moe_recipes.prove.task import Layout, Task, layouts
from moe_recipes.prove.weights import boost
from moe_recipes.train.run import make_model

SCHEMA_VERSION = 1
FACTS = "family.json"
MOST_PARAMETERS = 20_000_000
"""Of a small model: eight ranks hold it, its gradients and its reference, on any laptop."""


def _experts_of(model: nn.Module) -> list[nn.Module]:
    return [block.experts for block in moe_blocks(model)]


def write_family(folder: Path, recipe: Recipe) -> None:
    """In one process: the small model's weights, the reference, and what the family can do (``family.json``).

    Raises:
        MoeRecipesError: the recipe's model cannot be built.
    """
    # The recipe's own layout is of its true size: the small model has too few experts for it.
    source = read_source(replace(recipe, parallel=Parallel()))
    config = load_config(source, folder / "config")
    plain = _plain_model(config)
    if num_blocks := count_blocks(source.config, None):
        attach_mtp(plain, num_blocks, None)
        for layer in mtp_of(plain).layers():
            layer.to_empty(device="cpu")
        keep_frozen(plain)
    boost(plain)
    plain.save_pretrained(folder / "weights")
    attention = recipe.model.attn_implementation
    if attention == "sdpa" and not plain._supports_sdpa:
        attention = "eager"
    alone = Task(folder=folder, recipe=_with_attention(recipe, attention), packed=False)
    alone_recipe = alone.run_recipe(Layout(num_ranks=1, ep_size=1), clip=0.0)
    reason = why_not_packed(make_model(alone_recipe, read_source(alone_recipe)))
    aux = recipe.train.router_aux_loss_coef > 0 and has_load_balancing(plain)
    packed = reason is None
    text = config.get_text_config()
    documents = make_documents(vocab_size=text.vocab_size, packed=packed)
    write_reference(folder / "weights", documents, folder / "reference.pt", experts_of=_experts_of, aux_loss=aux,
                    mtp_coef=recipe.train.mtp_loss_coef or 0.0)  # fmt: skip
    facts = {
        "class": type(plain).__name__,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "expert_parallel": bool(text.base_model_ep_plan) and bool(_experts_of(plain)),
        "attention": attention,
        "packed": packed,
        "not_packed_because": reason,
        "time_step_limit": any(hasattr(module, "time_step_limit") for module in plain.modules()),
    }
    (folder / FACTS).write_text(json.dumps(facts))


def _plain_model(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Transformers' own model with its own initial weights, eager.

    Raises:
        RecipeError: the family is no causal language model, or its config was not cut to a size for this machine.
    """
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(
            f"model_type {config.model_type!r}: Transformers has no causal language model for it; name another model"
        )
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise RecipeError(
            f"model_type {config.model_type!r}: Transformers cannot build it from this config ({first_line(error)});"
            " mend config.json, or set model.config_overrides in a recipe"
        ) from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sum(sizes.values()) > MOST_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RecipeError(
            f"model_type {config.model_type!r}: cut small it still has {sum(sizes.values()):,} parameters,"
            f" {sizes[largest]:,} of them in {largest}; lower that width by model.config_overrides in a recipe"
        )
    return transformers.AutoModelForCausalLM.from_config(config, **options)


def _with_attention(recipe: Recipe, attention: str) -> Recipe:
    return replace(recipe, model=replace(recipe.model, attn_implementation=attention))


def prove(recipe: Recipe, folder: Path, notes: Sequence[str]) -> dict[str, Any]:
    """Run everything; returns what goes to ``prove.json``.

    Raises:
        RanksFailedError: the reference could not be made; ``exit_code`` says whose fault it is.
    """
    start = time.monotonic()
    run_on_ranks(write_family, 1, folder, recipe)
    facts = json.loads((folder / FACTS).read_bytes())
    notes = list(notes)
    if facts["not_packed_because"]:
        notes.append(f"one document a row: {facts['not_packed_because']}")
    elif not recipe.data.packing:
        notes.append("documents share rows here, which is the harder case, though the recipe has data.packing: false")
    if facts["time_step_limit"]:
        notes.append("the reference is eager Transformers with time_step_limit set from its config, its one correction")
    task = Task(folder=folder, recipe=_with_attention(recipe, facts["attention"]), packed=facts["packed"])
    found = []
    replicas = recipe.parallel.dp_replicate_size > 1
    for layout in layouts(expert_parallel=facts["expert_parallel"], replicas=replicas):
        began = time.monotonic()
        try:
            run_on_ranks(prove_layout, layout.num_ranks, task, layout)
            checks = json.loads(task.checks(layout).read_bytes())
        except RanksFailedError as error:
            print(error, file=sys.stderr)
            said = {"name": "ran to its end", "passed": False, "value": None, "limit": None, "found": error.cause}
            checks = [said]
        seconds = round(time.monotonic() - began, 1)
        found.append({"layout": str(layout), "num_ranks": layout.num_ranks, "seconds": seconds, "checks": checks})
    passed = all(check["passed"] for layout in found for check in layout["checks"])
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": "PASS" if passed else "FAIL",
        "recipe": recipe.name,
        "model": facts,
        "notes": notes,
        "layouts": found,
        "seconds": round(time.monotonic() - start, 1),
    }


def _clear(folder: Path) -> None:
    """Remove an earlier proof.

    Raises:
        CannotWriteError: the folder holds something else.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "weights").exists() and not (folder / "prove.json").exists():
        raise CannotWriteError(f"{folder}: is there, but holds no earlier proof; move it away")
    shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove, print the report, write the JSON. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe-json", required=True)
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.getLogger("moe_recipes").setLevel(logging.ERROR)
    # Gathering an expert's shards for the comparison is slow and warns of it; a step never does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        recipe = recipe_from_dict(json.loads(options.recipe_json))
        _clear(options.folder)
        options.folder.mkdir(parents=True)
        record = prove(recipe, options.folder, options.note)
    except MoeRecipesError as error:
        return say_error(str(error), error.exit_code, as_json=options.json)
    except RanksFailedError as error:
        if error.exit_code == EXIT_INTERNAL:
            print(error, file=sys.stderr)
        return say_error(error.cause, error.exit_code, as_json=options.json)
    write_json(options.folder / "prove.json", record)
    text = "\n".join(report_lines(record))
    (options.folder / "report.txt").write_text(f"{text}\n")
    print(json.dumps(record) if options.json else f"{text}\n\n{record['verdict']}: {options.folder / 'prove.json'}")
    return EXIT_OK if record["verdict"] == "PASS" else NotFiniteError.exit_code


if __name__ == "__main__":
    sys.exit(main())
