"""A model's config.json, from the package, a folder or the local Hugging Face cache. Nothing is downloaded."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_recipes.config.checks import PACKAGE_PREFIX
from moe_recipes.config.errors import CorruptCheckpointError, MissingInputError, RecipeError, did_you_mean
from moe_recipes.config.recipe import Model
from moe_recipes.families import PUBLISHED

PACKAGED = Path(__file__).resolve().parents[1] / "models" / "configs"
PACKAGED_NAMES = {source: model.packaged for source, model in PUBLISHED.items()}
"""The packaged config that stands for a Hugging Face id where only the shape of the model is asked for."""

_LAYER_KINDS = {
    **dict.fromkeys(("M", "mamba", "linear_attention"), "linear_attention"),
    **dict.fromkeys(("*", "attention", "full_attention"), "full_attention"),
    **dict.fromkeys(("E", "moe"), "moe"),
    **dict.fromkeys(("-", "mlp"), "mlp"),
}
_KNOWN_KINDS = ", ".join(sorted({*_LAYER_KINDS.values()}))


def read_model_config(model: Model) -> tuple[dict[str, Any], bytes, str]:
    """The config that the model is built from, and what it was made of.

    Returns:
        The config with ``config_overrides`` applied, the source's config.json byte for byte, and where it came from.
    Raises:
        MissingInputError: no such folder, config.json or cached repository.
        CorruptCheckpointError: config.json is not a JSON object.
        RecipeError: no such packaged config, or an override of a key that the config does not have.
    """
    path, description = find_model_config(model)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingInputError(f"{path}: cannot be read: {error.strerror}; model.source={model.source!r}") from error
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: not valid JSON: {error}; fetch the file again") from error
    if not isinstance(config, dict):
        raise CorruptCheckpointError(f"{path}: must hold a JSON object, as a model's config.json does")
    return override_config(config, model.config_overrides), raw, description


def find_model_config(model: Model) -> tuple[Path, str]:
    """Path of config.json, and a description of the source.

    Raises:
        MissingInputError, RecipeError: as ``read_model_config``.
    """
    source = model.source
    if source.startswith(PACKAGE_PREFIX):
        name = source.removeprefix(PACKAGE_PREFIX)
        known = sorted(folder.name for folder in PACKAGED.iterdir() if (folder / "config.json").is_file())
        if name not in known:
            raise RecipeError(f"model.source={source!r}: no packaged config {name!r}{did_you_mean(name, known)}")
        return PACKAGED / name / "config.json", f"config of the package, {name}"
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise MissingInputError(f"model.source={source!r}: the folder has no config.json")
        return path, f"folder {source}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source):
        raise MissingInputError(f"model.source={source!r}: no such folder")
    return _cached_config(source, model.revision), f"Hugging Face {source} at {model.revision or 'main'}"


def _cached_config(repo_id: str, revision: str | None) -> Path:
    at = f" at revision {revision}" if revision else ""
    option = f" --revision {revision}" if revision else ""
    missing = MissingInputError(
        f"model.source={repo_id!r}: no such folder, and the local Hugging Face cache has no config.json of it{at};"
        f" fetch it first with `hf download {repo_id}{option}`"
    )
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError as error:
        raise missing from error
    path = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(path, str):
        raise missing
    return Path(path)


def override_config(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the config with keys replaced; a dotted key reaches into a nested mapping.

    Raises:
        RecipeError: the config has no such key.
    """
    changed = copy.deepcopy(dict(config))
    for dotted, value in overrides.items():
        target: Any = changed
        parts = [dotted] if dotted in changed else dotted.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(target, dict) or part not in target:
                inside = f"model.config_overrides.{dotted}"
                known = target if isinstance(target, dict) else {}
                hint = did_you_mean(part, known) if known else f"; {'.'.join(parts[:depth])} is not a mapping"
                raise RecipeError(f"{inside}: the model's config has no key {part!r}{hint}")
            if depth == len(parts) - 1:
                target[part] = copy.deepcopy(value)
            else:
                target = target[part]
    return changed


def hybrid_layers(config: Mapping[str, Any]) -> list[str] | None:
    """The kind of every layer of a hybrid model: ``linear_attention`` (Mamba), ``full_attention``, ``moe``, ``mlp``.

    Reads Nemotron-H's letters (``hybrid_override_pattern``) and its list (``layers_block_type``) with old and new
    names. None for a model whose layers are not listed so.

    Raises:
        RecipeError: a layer of an unknown kind.
    """
    layers = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if not layers:
        return None
    unknown = sorted({str(layer) for layer in layers if layer not in _LAYER_KINDS})
    if unknown:
        raise RecipeError(f"the model's config has layers of the unknown kind {unknown[0]!r}; known: {_KNOWN_KINDS}")
    return [_LAYER_KINDS[layer] for layer in layers]
