"""Is an export what it should be? ``python -m moe_recipes.models.check_export RUN_DIR``, in one process.

Loads ``RUN/export`` with plain Transformers, Mamba's time step limited as the config says, compares its logits with
those that the trainer left in ``RUN/export_probe.safetensors``, and generates a line of text where it has a
tokenizer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from moe_recipes.config.errors import MissingInputError, MoeRecipesError, NotFiniteError
from moe_recipes.models.time_step import honour_time_step_limit

logger = logging.getLogger("moe_recipes")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06}
"""Largest difference of a logit, over the largest logit. bfloat16 rounds differently in every order of a sum."""

QUESTION = "What does json.dumps do?"


def read_probe(run_dir: Path) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """The trainer's tokens and logits, and the dtype that it computed in.

    Raises:
        MissingInputError: the run left none, or no export.
    """
    path = run_dir / "export_probe.safetensors"
    if not path.is_file() or not (run_dir / "export").is_dir():
        raise MissingInputError(f"{run_dir}: no finished export; export the run with `moe-recipes export {run_dir}`")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("input_ids", "logits")}
        return tensors, getattr(torch, file.metadata()["dtype"])


def compare_logits(
    run_dir: Path, model: transformers.PreTrainedModel, probe: dict[str, torch.Tensor], dtype: torch.dtype
) -> float:
    """Largest difference to the trainer's logits over the largest logit.

    Raises:
        NotFiniteError: the difference is beyond the dtype's tolerance.
    """
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"].to(model.device)).logits.float().cpu()
    difference = float((logits - probe["logits"]).abs().max() / probe["logits"].abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise NotFiniteError(
            f"{run_dir / 'export'}: logits differ from the trained model's by {difference:.1e} of the largest;"
            f" allowed: {TOLERANCE[dtype]:.0e} in {dtype}"
        )
    return difference


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
    run_dir: Path = parser.parse_args().run_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        probe, dtype = read_probe(run_dir)
        model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "export", dtype=dtype)
        honour_time_step_limit(model)  # which plain Transformers ignores and the trainer does not
        difference = compare_logits(run_dir, model, probe, dtype)
        logger.info("export: loads in plain Transformers; logits differ by %.1e of the largest", difference)
        if (run_dir / "export" / "tokenizer.json").is_file():
            logger.info("export: %s -> %s", QUESTION, generate_line(run_dir / "export", model, QUESTION))
    except MoeRecipesError as error:
        logger.error("moe-recipes: error: %s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
