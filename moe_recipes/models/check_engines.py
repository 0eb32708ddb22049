"""Does a serving engine compute what the trainer computed? Run it where the engine is installed, on one export:

    python -m moe_recipes.models.check_engines vllm RUN [--json OUT] [--option tensor_parallel_size=8]
    python -m moe_recipes.models.check_engines sglang RUN [--option tp_size=8]

The trainer left the logits of fixed rows of tokens in ``RUN/export_probe.safetensors``. The engine reads each row as a
prompt, and reads its first half and decodes the second half, which is forced on it, so that prefill and decode are both
held to the trainer's numbers at every place. Ends with one line; exit code 0, 17 where the engine differs or cannot
load the export, 66 where there is none, 78 where the engine is not installed or does not run this model on this device.

Nothing here needs Transformers of the trainer's version: an engine brings its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_recipes.config.errors import (
    EXIT_NOT_FINITE,
    EXIT_OK,
    EnvironmentMismatchError,
    MissingInputError,
    MoeRecipesError,
    NotFiniteError,
    RecipeError,
    first_line,
)

logger = logging.getLogger("moe_recipes")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06}
"""Largest difference of a log-probability, over the trainer's largest logit; by the dtype that the trainer computed in.
The same as for logits in ``check_export``: engines sum in other orders, which bfloat16 rounds differently."""

SHARE_WITHIN = {"float32": 1.0, "bfloat16": 0.875}
"""Share of the places that must be within the tolerance. In bfloat16 two experts can be equally good for a token, and
another order of sums sends it to the other one: that token then differs by whole nats, in any two programs."""

TOP_TOKENS = 20
"""Likeliest tokens compared at every position, beside the token that follows: what engines give by default."""

Positions = dict[int, dict[int, float]]
"""Place in the rows -> token -> the engine's log-probability that it comes next."""


class _EngineError(Exception):
    """What an engine said in a process of its own."""


@dataclass(frozen=True)
class Probe:
    """What the trainer left: rows of S tokens and its own log-probabilities, [rows * S, vocabulary], float32."""

    rows: list[list[int]]
    log_probs: torch.Tensor
    largest_logit: float
    dtype: str


def read_probe(path: Path) -> Probe:
    """The trainer's rows of tokens.

    Raises:
        MissingInputError: there is none, or it is not whole.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no probe of the trainer; export the run with `moe-recipes export RUN`")
    try:
        with safe_open(path, "pt") as file:
            ids, logits = (file.get_tensor(name) for name in ("input_ids", "logits"))
            dtype = file.metadata()["dtype"]
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise MissingInputError(f"{path}: cannot be read ({first_line(error)}); export the run again") from error
    logits = logits.flatten(0, 1).float()
    return Probe(ids.tolist(), logits.log_softmax(-1), float(logits.abs().max()), dtype)


def compare(probe: Probe, positions: Positions) -> dict[str, Any]:
    """Hold an engine's log-probabilities against the trainer's.

    Args:
        positions: by place in the rows laid end to end, 0-based; the last place of a row speaks of what follows it.

    Returns:
        ``positions``, ``greedy_equal``: places, and those where both name the same likeliest token. ``beyond``: places
        that differ by more than ``tolerance_nats``, or where the engine's likeliest token is one that the trainer holds
        less likely than its own by more than rounding. ``largest_difference_nats`` of all places, and of those within;
        ``mean_difference_nats``; ``agrees``.
    """
    tolerance = TOLERANCE[probe.dtype] * probe.largest_logit
    worst, beyond, equal, total = {}, [], 0, 0.0
    for place, found in sorted(positions.items()):
        trained = probe.log_probs[place]
        differences = torch.tensor([value - float(trained[token]) for token, value in found.items()]).abs()
        worst[place] = float(differences.max())  # NaN if one is
        total += float(differences.mean())
        best = max(found, key=lambda token: found[token])
        equal += best == int(trained.argmax())
        if not (worst[place] <= tolerance and float(trained.max() - trained[best]) <= 2 * tolerance):
            beyond.append(place)
    allowed = int(len(positions) * (1 - SHARE_WITHIN[probe.dtype]))
    return {
        "positions": len(positions),
        "greedy_equal": equal,
        "beyond": beyond,
        "largest_difference_nats": max(worst.values(), key=lambda value: float("inf") if value != value else value),
        "largest_difference_within_nats": max((worst[place] for place in worst if place not in beyond), default=None),
        "mean_difference_nats": total / len(positions),
        "tolerance_nats": tolerance,
        "agrees": total == total and len(beyond) <= allowed,
    }


def check_vllm(export: Path, *, probe: Path | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load an export in vLLM, in this process, and compare prefill and decode with the trainer's probe.

    Args:
        export: the exported folder.
        probe: the trainer's file; ``export_probe.safetensors`` beside the export if not given.
        options: further arguments of ``vllm.LLM``, such as ``{"tensor_parallel_size": 8}``.

    Returns:
        ``engine``, ``versions``, ``device``, ``model_type``, ``dtype``, ``prefill`` and ``decode`` (see ``compare``),
        ``agrees``.

    Raises:
        MissingInputError: no export, or no probe.
        EnvironmentMismatchError: vLLM is not installed, or does not run this model on this device.
        NotFiniteError: vLLM refuses the export.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an error of the engine reaches this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on a CPU it would take half of the memory
    return _check("vllm", export, probe, _ask_vllm, options or {})


def _ask_vllm(export: Path, probe: Probe, options: Mapping[str, Any]) -> dict[str, tuple[Probe, Positions]]:
    from vllm import LLM, SamplingParams

    length = len(probe.rows[0])
    half = length // 2
    engine = LLM(
        str(export),
        dtype=probe.dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=length + 1,
        max_num_seqs=2 * len(probe.rows),
        logits_processors=["moe_recipes.models.forced_tokens:ForcedTokens"],
        **options,
    )
    plain = {"temperature": 0.0, "logprobs": TOP_TOKENS, "detokenize": False, "ignore_eos": True}
    prompts, asked = [], []
    for row in probe.rows:
        prompts += [{"prompt_token_ids": row}, {"prompt_token_ids": row[:half]}]
        asked.append(SamplingParams(max_tokens=1, prompt_logprobs=TOP_TOKENS, **plain))
        asked.append(SamplingParams(max_tokens=length - half, extra_args={"forced_tokens": row[half:]}, **plain))
    answers = engine.generate(prompts, asked, use_tqdm=False)

    def values(found: dict[int, Any]) -> dict[int, float]:
        return {token: entry.logprob for token, entry in found.items()}

    prefill: Positions = {}
    decode: Positions = {}
    for number, (whole, stepwise) in enumerate(zip(answers[::2], answers[1::2], strict=True)):
        first = number * length
        # What an engine says of token i is its view after token i - 1.
        views = [values(found) for found in [*whole.prompt_logprobs[1:], whole.outputs[0].logprobs[0]]]
        prefill |= {first + place: view for place, view in enumerate(views)}
        steps = enumerate(stepwise.outputs[0].logprobs, first + half - 1)
        decode |= {place: values(found) for place, found in steps}
    return {"prefill": (probe, prefill), "decode": (probe, decode)}


def check_sglang(
    export: Path, *, probe: Path | None = None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``check_vllm`` for SGLang, which decodes no given tokens: its decode path continues the first half of a row
    greedily and is held to its own prefill of that continuation, as its prefill is to the trainer.

    Raises:
        MissingInputError, EnvironmentMismatchError, NotFiniteError: as ``check_vllm``.
    """
    return _check("sglang", export, probe, _ask_sglang, options or {})


def _ask_sglang(export: Path, probe: Probe, options: Mapping[str, Any]) -> dict[str, tuple[Probe, Positions]]:
    """In a process of its own: SGLang ends the whole process, without a word to it, when a model does not load."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        asked = {"export": str(export), "dtype": probe.dtype, "rows": probe.rows, "options": dict(options)}
        question.write_text(json.dumps({**asked, "top_tokens": TOP_TOKENS}))
        command = [sys.executable, "-m", "moe_recipes.models.ask_sglang", str(question), str(answer)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if not answer.is_file():
            said = [line.strip() for line in done.stdout.splitlines() if "Error" in line]
            raise _EngineError(said[-1] if said else f"it ended with {done.returncode} and without an answer")
        views = json.loads(answer.read_text())
    prefill: Positions = {}
    decode: Positions = {}
    own = torch.full_like(probe.log_probs, float("-inf"))
    length = len(probe.rows[0])
    for number, part in enumerate(views):
        whole, stepwise, again = (_numbered(part[name], number * length) for name in ("prefill", "stepwise", "again"))
        prefill |= whole
        last = (number + 1) * length - 1
        for place in range(last - (length - length // 2), last):
            own[place, list(again[place])] = torch.tensor(list(again[place].values()))
            decode[place] = {token: value for token, value in stepwise[place].items() if token in again[place]}
    return {"prefill": (probe, prefill), "decode": (replace(probe, log_probs=own), decode)}


def _numbered(view: dict[str, dict[str, float]], first: int) -> Positions:
    """A row's view as JSON has it, its places counted from ``first``."""
    return {first + int(place): {int(token): value for token, value in found.items()} for place, found in view.items()}


def _check(
    engine: str,
    export: Path,
    probe_path: Path | None,
    ask: Callable[[Path, Probe, Mapping[str, Any]], dict[str, tuple[Probe, Positions]]],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    if not (export / "config.json").is_file():
        raise MissingInputError(f"{export}: no exported model; give a run folder that has `export`, or that folder")
    probe = read_probe(probe_path or export.parent / "export_probe.safetensors")
    versions = _versions(engine)
    named = f"{engine} {versions[engine]}"
    try:
        found = ask(export, probe, options)
    except NotImplementedError as error:
        raise EnvironmentMismatchError(f"{export}: {named} does not run it here: {first_line(error)}") from error
    except Exception as error:  # whatever an engine raises while it loads: its own words, on one line
        said = first_line(error) if isinstance(error, _EngineError) else f"{type(error).__name__}: {first_line(error)}"
        raise NotFiniteError(f"{export}: {named} does not take it: {said}") from error
    parts = {name: compare(reference, positions) for name, (reference, positions) in found.items()}
    return {
        "engine": engine,
        "versions": versions,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "model_type": json.loads((export / "config.json").read_bytes()).get("model_type"),
        "dtype": probe.dtype,
        "options": dict(options),
        **parts,
        "agrees": all(part["agrees"] for part in parts.values()),
    }


def _versions(engine: str) -> dict[str, str]:
    """Version of the engine and of what it computes with; the CPU build of vLLM is another distribution.

    Raises:
        EnvironmentMismatchError: the engine is not installed.
    """
    found = {}
    for name, distributions in ((engine, (engine, f"{engine}-cpu")), ("torch", ("torch",)), ("transformers",) * 2):
        for distribution in (distributions,) if isinstance(distributions, str) else distributions:
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    if engine not in found:
        raise EnvironmentMismatchError(
            f"{engine} is not installed for {sys.executable}; run this with the Python of an environment that has it"
            " (docs/serve-and-evaluate.md)"
        )
    return found


def _some(places: list[int], at_most: int = 8) -> str:
    return ", ".join(map(str, places[:at_most])) + (" ..." if len(places) > at_most else "")


def summary(report: dict[str, Any]) -> str:
    """One line about a report of ``check_vllm`` or ``check_sglang``."""
    parts = [
        f"{name}: {part['greedy_equal']} of {part['positions']} greedy tokens equal, log-probabilities differ by at"
        f" most {part['largest_difference_nats']:.1e} nats (allowed {part['tolerance_nats']:.1e})"
        + (f", {len(part['beyond'])} places beyond it: {_some(part['beyond'])}" if part["beyond"] else "")
        for name, part in report.items()
        if isinstance(part, dict) and "greedy_equal" in part
    ]
    word = "agrees with" if report["agrees"] else "differs from"
    return f"{report['engine']} {report['versions'][report['engine']]} {word} the trainer: {'; '.join(parts)}"


ENGINES = {"vllm": check_vllm, "sglang": check_sglang}


def _option(word: str) -> tuple[str, Any]:
    """``tensor_parallel_size=8``: numbers, true and false as JSON has them, anything else is text.

    Raises:
        RecipeError: there is no ``=``.
    """
    key, sign, value = word.partition("=")
    if not (key and sign):
        raise RecipeError(f"--option {word}: write it as KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_recipes.models.check_engines")
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("folder", type=Path, help="a run folder, or its export")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the report to this file")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an argument of the engine, repeatable"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    folder: Path = options.folder
    export = folder / "export" if (folder / "export").is_dir() else folder
    try:
        report = ENGINES[options.engine](export.resolve(), options=dict(map(_option, options.option)))
    except MoeRecipesError as error:
        logger.error("moe-recipes: error: %s", error)
        return error.exit_code
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{folder}: {summary(report)}\n")
    return EXIT_OK if report["agrees"] else EXIT_NOT_FINITE


if __name__ == "__main__":
    sys.exit(main())
