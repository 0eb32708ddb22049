"""Recipe -> model and tokenizer on this rank."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from moe_recipes.config.checks import check_model_config
from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError, RecipeError, first_line
from moe_recipes.config.model_config import find_model_config, read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.export_convert import gather_objects
from moe_recipes.models.export_folder import source_keys
from moe_recipes.models.mtp import mtp_attached, mtp_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from, resolved to local files."""

    folder: Path
    config: dict[str, Any]
    """config.json with the recipe's overrides."""

    config_json: bytes
    """What an export writes: the source's bytes, or the overridden config where there are overrides."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; composite models have it in their text part."""
        return int(self.config.get("text_config", self.config)["vocab_size"])

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


def read_source(recipe: Recipe) -> Source:
    """Find and check the model's files; nothing is downloaded.

    Raises:
        MissingInputError, CorruptCheckpointError, RecipeError: each names the file or key and the mend.
    """
    config, raw, _ = read_model_config(recipe.model)
    check_model_config(recipe, config)
    folder = find_model_config(recipe.model)[0].parent
    if recipe.model.weights == "pretrained":
        check_weight_files(folder)
    changed = bool(recipe.model.config_overrides)
    return Source(
        folder=folder, config=config, config_json=(json.dumps(config, indent=2) + "\n").encode() if changed else raw
    )


def check_weight_files(folder: Path) -> None:
    """Refuse a model folder with a missing, empty or truncated safetensors file, by name.

    Raises:
        MissingInputError: no weights, or a file of the index is not there.
        CorruptCheckpointError: a file or the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpointError(f"{index}: not a safetensors index ({error}); fetch the file again") from error
    else:
        files = ["model.safetensors"]
    for name in files:
        path = folder / name
        if Path(name).name != name:
            raise CorruptCheckpointError(
                f"{index}: file name {name!r} leaves the model folder; do not trust this model"
            )
        if not path.is_file():
            raise MissingInputError(f"{path}: not there ({len(files)} weight files expected); fetch the model again")
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpointError(
                f"{path}: cut short or not safetensors ({error}); fetch the file again"
            ) from error


def load_config(source: Source, folder: Path) -> PreTrainedConfig:
    """The config object of a possibly overridden config.json, through a file, so that Transformers reads it as usual.

    ``folder`` is private to this rank and may be removed afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(source.config_json)
    return AutoConfig.from_pretrained(folder)


def layout(recipe: Recipe) -> DistributedConfig:
    """The recipe's layout in Transformers' terms."""
    parallel = recipe.parallel
    return DistributedConfig(
        fsdp_size=parallel.fsdp_size,
        ep_size=parallel.ep_size,
        dp_replicate_size=parallel.dp_replicate_size,
        ep_implementation=parallel.ep_implementation if parallel.ep_size > 1 else "auto",
        # Transformers' flag means bfloat16 compute with a float32 reduction; float32 models need neither.
        fsdp_mixed_precision=parallel.reduce_dtype == "float32" and recipe.model.dtype == "bfloat16",
    )


def build_model(recipe: Recipe, source: Source, *, scratch: Path, meta: bool = False) -> PreTrainedModel:
    """Load or draw the model, distributed over the ranks. Every rank must call it.

    Args:
        meta: only lay it out: the shards stay on the meta device, and no weight is read or drawn.
    Raises:
        RecipeError: expert parallelism on a family without a plan for it, or a name that Transformers does not know.
        CorruptCheckpointError: a pretrained folder lacks weights of the model, or holds them in other shapes.
    """
    config = load_config(source, scratch)
    if recipe.parallel.ep_size > 1 and not config.get_text_config().base_model_ep_plan:
        raise RecipeError(
            f"parallel.ep_size={recipe.parallel.ep_size}: {config.model_type!r} has no expert-parallel plan in"
            f" Transformers; set parallel.ep_size=1"
        )
    options: dict[str, Any] = {
        "dtype": getattr(torch, recipe.model.dtype),
        "attn_implementation": recipe.model.attn_implementation,
        "distributed_config": layout(recipe),
    }
    if recipe.kernels.experts != "moe_recipes":
        options["experts_implementation"] = recipe.kernels.experts
    names = source_keys(source.folder) if recipe.model.weights == "pretrained" else None
    try:
        with mtp_attached(source.config, names):
            if meta:
                return AutoModelForCausalLM.on_meta(config, **options)
            if recipe.model.weights == "random":
                return AutoModelForCausalLM.from_config(config, seed=recipe.train.seed, **options)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            options["config"] = _dequantised(recipe, config)
            model = _load_weights(source.folder, num_ranks=recipe.parallel.num_ranks, **options)
    except (ValueError, ImportError) as error:
        raise _refused_choice(recipe, error) or error from None
    return model if recipe.parallel.num_ranks > 1 else model.to(device)


def _dequantised(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with which quantised weights load as ``model.dtype``; codes are no weights that a step could move.

    Raises:
        RecipeError: such weights do not load exactly. Transformers shards FP8 scales apart from their codes, so that
            blocks that a shard's border cuts get the scale of another block, without an error.
    """
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return config
    method, num_ranks = quantization.get("quant_method"), recipe.parallel.num_ranks
    if method not in ("fp8", "mxfp4") or (method == "fp8" and num_ranks > 1):
        raise RecipeError(
            f"model.source={recipe.model.source!r} is quantised ({method}), which does not load exactly on {num_ranks}"
            f" ranks; save it as bfloat16 from one process (dequantize=True) and name that folder"
        )
    config.quantization_config = {**quantization, "dequantize": True}
    return config


def _load_weights(folder: Path, *, num_ranks: int, **options: Any) -> PreTrainedModel:
    """``from_pretrained``, but a weight that the folder lacks is an error: Transformers warns, and draws it at random.

    Raises:
        CorruptCheckpointError: the same on all ranks, though a rank that does not hold an expert may miss nothing.
    """
    model, problem = None, None
    try:
        # Other shapes pass here, to be named below: the error of Transformers does not say which tensor it means.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        problem = _weights_problem(info) or _copies_problem(folder, model)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        problem = "experts of one layer that do not fit together (the log names them)"
    problems = [found for found in gather_objects(problem, num_ranks) if found]
    if problems:
        raise CorruptCheckpointError(
            f"{folder}: {problems[0]}; fetch the model again, or the config.json that belongs to its weights"
        )
    return model


def _copies_problem(folder: Path, model: PreTrainedModel) -> str | None:
    """What speaks against taking the tensors that multi-token prediction repeats from the model, which drops what the
    files say. Reads a few rows at both ends of each."""
    mtp = mtp_of(model)
    for copied, own in (mtp.copies if mtp is not None else {}).items():
        if any(not torch.equal(*pair) for pair in zip(_edges(folder, copied), _edges(folder, own), strict=True)):
            return f"{copied} is not the same as {own}, which multi-token prediction shares"
    return None


def _edges(folder: Path, name: str, *, rows: int = 8) -> list[torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_bytes())["weight_map"][name] if index.is_file() else "model.safetensors"
    with safe_open(folder / file, "pt") as opened:
        part = opened.get_slice(name)
        return [part[:rows], part[max(0, part.get_shape()[0] - rows) :]]


def _weights_problem(info: Mapping[str, Any]) -> str | None:
    """What the loading report has against the weights, in a few words; tensors that the model lacks are no problem."""
    if info["mismatched_keys"]:
        names = sorted(str(key[0]) for key in info["mismatched_keys"])  # the shapes beside them are those of shards
        return f"{names[0]} has another shape than in the model ({len(names)} such tensors)"
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        return f"no weights for {names[0]} ({len(names)} tensors of the model are missing)"
    return None


def _refused_choice(recipe: Recipe, error: Exception) -> RecipeError | None:
    """Transformers' refusal of a backend that the recipe names, as the recipe's error; None for any other error."""
    reason = str(error).strip().split(". ")[0].splitlines()[0].rstrip(".")
    attention = recipe.model.attn_implementation
    if re.search(r"attn_implementation|attention implementation|flash.?attention", str(error), re.IGNORECASE):
        return RecipeError(
            f"model.attn_implementation={attention}: {reason}; set sdpa, or eager, which every model has"
        )
    if "experts implementation" in str(error) or "experts_implementation" in str(error):
        return RecipeError(f"kernels.experts={recipe.kernels.experts}: {reason}; set kernels.experts: moe_recipes")
    if "ep_implementation" in str(error) or "to hold the same batch" in str(error):
        chosen = recipe.parallel.ep_implementation
        return RecipeError(f"parallel.ep_implementation={chosen}: {reason}; leave the key out")
    return None


def load_tokenizer(recipe: Recipe, source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or None where the data needs none.

    Raises:
        MissingInputError: no tokenizer there.
    """
    if recipe.data.format == "random_tokens":
        return None
    place = recipe.model.tokenizer or str(source.folder)
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(place).is_dir():
            reason = first_line(error)
            raise MissingInputError(
                f"model.tokenizer: the folder {place!r} holds no usable tokenizer ({reason}); put tokenizer.json and"
                f" tokenizer_config.json there, or name another folder"
            ) from error
        raise MissingInputError(
            f"model.tokenizer: no folder {place!r}, and the local Hugging Face cache has no such tokenizer;"
            f" name a folder, or fetch it first with: hf download {place}"
        ) from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Changes when a tokenizer would give other ids or another rendering of a chat."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(f"{words}\n{template}".encode()).hexdigest()[:16]
