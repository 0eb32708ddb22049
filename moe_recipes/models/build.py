"""Recipe -> model and tokenizer on this rank."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from moe_recipes.config.checks import check_model_config
from moe_recipes.config.errors import MissingInputError, RecipeError, first_line
from moe_recipes.config.model_config import find_model_config, read_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.loading.files import open_weights
from moe_recipes.models.loading.load import load_weights
from moe_recipes.models.loading.plan import SeveralAtOnceError
from moe_recipes.models.loading.stored import Quantization
from moe_recipes.models.loading.whole import from_pretrained_whole
from moe_recipes.models.mtp import mtp_attached

logger = logging.getLogger("moe_recipes")


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
        open_weights(folder).check_present()
    changed = bool(recipe.model.config_overrides)
    return Source(
        folder=folder, config=config, config_json=(json.dumps(config, indent=2) + "\n").encode() if changed else raw
    )


def load_config(source: Source, folder: Path) -> PreTrainedConfig:
    """The config object of a possibly overridden config.json, through a file, so that Transformers reads it as usual.

    ``folder`` is private to this rank and may be removed afterwards.

    Raises:
        RecipeError: a family that Transformers does not know. Code that comes with a model is never run.
    """
    family = source.config.get("model_type")
    if family not in CONFIG_MAPPING:
        code = ", and the code that the model brings along (auto_map) is not run" if "auto_map" in source.config else ""
        raise RecipeError(
            f"{source.folder / 'config.json'}: model_type {family!r} is not in Transformers"
            f" {transformers.__version__}{code}; take a model of a known family, or a newer Transformers"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(source.config_json)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


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
    quantization = quantization_of(recipe, source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    options: dict[str, Any] = {
        "dtype": getattr(torch, recipe.model.dtype),
        "attn_implementation": recipe.model.attn_implementation,
        "distributed_config": layout(recipe),
    }
    if recipe.kernels.experts != "moe_recipes":
        options["experts_implementation"] = recipe.kernels.experts
    names = open_weights(source.folder).weight_map if recipe.model.weights == "pretrained" else None

    def fill(model: PreTrainedModel, device: torch.device) -> None:
        load_weights(model, source.folder, device=device, quantization=quantization)

    try:
        with mtp_attached(source.config, names):
            if meta:
                return AutoModelForCausalLM.on_meta(config, **options)
            if recipe.model.weights == "random":
                return AutoModelForCausalLM.from_config(config, seed=recipe.train.seed, **options)
            try:
                return AutoModelForCausalLM.filled(config, fill, **options)
            except SeveralAtOnceError as error:
                return _load_by_transformers(recipe, source, config, error, quantization=quantization, **options)
    except (ValueError, ImportError) as error:
        raise _refused_choice(recipe, error) or error from None


def quantization_of(recipe: Recipe, config: Mapping[str, Any]) -> Quantization | None:
    """How the recipe's pretrained weights are quantised; a step moves values, and not the codes that the files hold.

    Args:
        config: config.json.
    Raises:
        RecipeError: codes that are not known.
    """
    found = config.get("quantization_config")
    if not found or recipe.model.weights == "random":
        return None
    method, block = found.get("quant_method"), found.get("weight_block_size") or (128, 128)
    if method not in ("fp8", "mxfp4") or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise RecipeError(
            f"model.source={recipe.model.source!r} is quantised ({method}); fp8 in blocks and mxfp4 can be trained"
            " from: save it as bfloat16 and name that folder"
        )
    return Quantization(method=method, block=(block[0], block[1]))


def _load_by_transformers(
    recipe: Recipe,
    source: Source,
    config: PreTrainedConfig,
    reason: Exception,
    *,
    quantization: Quantization | None,
    **options: Any,
) -> PreTrainedModel:
    """Transformers' own loader, for the families whose tensors are made of several at once: one log line says so.

    Raises:
        RecipeError: the source is quantised.
        CorruptCheckpointError: the folder lacks weights of the model.
    """
    if quantization is not None:
        raise RecipeError(f"model.source={recipe.model.source!r} is quantised ({quantization.method}), and {reason}")
    logger.warning("weights: read by Transformers, without a bound on host memory; %s", reason)
    model = from_pretrained_whole(source.folder, config=config, num_ranks=recipe.parallel.num_ranks, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model if recipe.parallel.num_ranks > 1 else model.to(device)


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
        RecipeError: it has tokens for which the model has no row of the embedding.
    """
    if recipe.data.format == "random_tokens":
        return None
    place = recipe.model.tokenizer or str(source.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
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
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= source.vocab_size:
        raise RecipeError(
            f"model.tokenizer: token {largest} of {place!r} is beyond the embedding of model.source, which has"
            f" {source.vocab_size} rows (vocab_size); name the tokenizer of this model"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Changes when a tokenizer would give other ids or another rendering of a chat."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(f"{words}\n{template}".encode()).hexdigest()[:16]
