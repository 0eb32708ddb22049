"""What the run reads: model files, the hub's cache, data, secrets; and whether the time limit holds a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_recipes.config.checks import HUB_DATA_PREFIX, PACKAGE_PREFIX
from moe_recipes.config.errors import (
    EXIT_CORRUPT_CHECKPOINT,
    EXIT_MISSING_INPUT,
    CorruptCheckpointError,
    MissingInputError,
)
from moe_recipes.config.model_config import find_model_config
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_to_dict
from moe_recipes.launch.preflight.probe import Probe, failed, not_available, passed
from moe_recipes.launch.secrets import read_secrets

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SAMPLE_LIMIT_S = 60.0
COMMIT = re.compile(r"[0-9a-f]{40}")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def model_files(recipe: Recipe) -> Probe:
    """Every weight file of the index is there with the very size that its header asks for, in sum the index's; and the
    tokenizer. The value is their bytes."""
    config = find_model_config(recipe.model)[0]
    folder = config.parent
    needs_tokenizer = recipe.data.format != "random_tokens" and recipe.model.tokenizer is None
    if needs_tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise MissingInputError(f"{folder}: no {' or '.join(TOKENIZER_FILES)}; fetch the model again")
    if recipe.model.weights == "random":
        return not_available("model.weights is random: no weight files are read", value=config.stat().st_size)
    names, total = _index(folder)
    found = 0
    for name in names:
        found += weight_bytes(folder / name)
    if total is not None and found != total:
        return failed(
            f"{folder / INDEX}: the files hold {found} bytes of tensors, the index says {total}; fetch the model again",
            value=found,
            floor=total,
            exit_code=EXIT_CORRUPT_CHECKPOINT,
        )
    return passed(found, floor=total, message=f"{len(names)} files, {revision_of(recipe)}")


def _index(folder: Path) -> tuple[list[str], int | None]:
    """Names of the weight files, and the bytes of their tensors where there is an index that says it."""
    path = folder / INDEX
    if not path.is_file():
        return [SINGLE], None
    try:
        index = json.loads(path.read_bytes())
        names = sorted(set(index["weight_map"].values()))
        total = index.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path}: not a safetensors index ({error}); fetch the file again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CorruptCheckpointError(
            f"{path}: file name {outside[0]!r} leaves the model folder; do not trust this model"
        )
    return names, int(total) if isinstance(total, int | float) else None


def weight_bytes(path: Path) -> int:
    """Bytes of tensors in a safetensors file, whose size must be the one that its header asks for.

    Raises:
        MissingInputError: not there.
        CorruptCheckpointError: cut short, too long, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MOST_HEADER_BYTES, size):
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}; fetch the model again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CorruptCheckpointError(f"{path}: not a safetensors file ({error}); fetch the file again") from error
    if size != 8 + length + end:
        cut = "cut short" if size < 8 + length + end else "too long"
        raise CorruptCheckpointError(
            f"{path}: {cut}: {size} bytes, its header asks for {8 + length + end}; fetch the file again"
        )
    return int(end)


def revision_of(recipe: Recipe) -> str:
    """The commit of the model's files where they lie in the hub's cache, else what the source is."""
    source = recipe.model.source
    if source.startswith(PACKAGE_PREFIX):
        return "config of the package"
    folder = find_model_config(recipe.model)[0].parent
    return folder.name if folder.parent.name == "snapshots" else f"folder {folder.name}"


def hub_ids(recipe: Recipe) -> list[str]:
    """What the recipe reads by the hub's ids: model, tokenizer, data."""
    named = [recipe.model.source, recipe.model.tokenizer or ""]
    ids = [n for n in named if n and not n.startswith(PACKAGE_PREFIX) and not Path(n).expanduser().exists()]
    return ids + [name for name in (*recipe.data.train, *recipe.data.validation) if name.startswith(HUB_DATA_PREFIX)]


def offline_hub(recipe: Recipe, environ: Mapping[str, str] | None = None) -> Probe:
    """Model and tokenizer of the hub are in the local cache at the pinned commit; the value is that commit."""
    ids = hub_ids(recipe)
    if not ids:
        return not_available("the recipe names nothing on the hub")
    notes = []
    environ = os.environ if environ is None else environ
    if environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        notes.append("HF_HUB_OFFLINE is not set: set it in the cluster file's env, so that no rank asks the network")
    value = None
    if recipe.model.source in ids:
        value = revision_of(recipe)
        pinned = recipe.model.revision
        if pinned is None:
            notes.append("model.revision is open")
        elif COMMIT.fullmatch(pinned) and value != pinned:
            return failed(f"the cache has {value}, model.revision is {pinned}", exit_code=EXIT_MISSING_INPUT)
    if recipe.model.tokenizer in ids:
        _cached_tokenizer(recipe.model.tokenizer or "")
    return passed(value, message="; ".join(notes))


def _cached_tokenizer(repo_id: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    if not any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in TOKENIZER_FILES):
        raise MissingInputError(
            f"model.tokenizer={repo_id!r}: no such folder, and not in the local cache; fetch it with"
            f" `hf download {repo_id}`"
        )


def data_sample(recipe: Recipe) -> Probe:
    """The first rows of every source are read and parsed by the trainer's own reader, without the network.

    A process of its own: readers of Parquet and of the hub's data sets are large.
    """
    if recipe.data.format == "random_tokens":
        return not_available("data.format is random_tokens: no data is read")
    words = ["-m", "moe_recipes.data.sample", "--recipe-json", json.dumps(recipe_to_dict(recipe))]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=SAMPLE_LIMIT_S,
        env={**os.environ, **OFFLINE},
        stdin=subprocess.DEVNULL,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()
        return failed(f"the reader ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
    if "error" in answer:
        return failed(answer["error"], exit_code=int(answer["exit_code"]))
    return passed(answer["rows"], message=f"{answer['sources']} sources")


def secrets_file(path: str | None) -> Probe:
    """Only its owner can read it, and it holds names that are known. The value lists the names."""
    if path is None:
        return not_available("the cluster file names no paths.secrets")
    return passed(sorted(read_secrets(path)))
