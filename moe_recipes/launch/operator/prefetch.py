"""The verb ``prefetch``: model and data of a recipe into the Hugging Face cache, at pinned commits, checked."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from moe_recipes.config.checks import HUB_DATA_PREFIX, PACKAGE_PREFIX, check_recipe
from moe_recipes.config.errors import (
    EXIT_OK,
    EnvironmentMismatchError,
    RecipeError,
)
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe
from moe_recipes.launch.arguments import add_json, add_overrides, add_recipe
from moe_recipes.launch.operator import hub
from moe_recipes.launch.operator.children import run_module
from moe_recipes.launch.secrets import read_secrets

COMMIT = re.compile(r"[0-9a-f]{40}")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*")
"""The same weights in formats that are not loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_overrides(parser)
    parser.add_argument("--check", action="store_true", help="fetch nothing: check what is cached, without a network")
    parser.add_argument("--cluster", metavar="FILE", help="use paths.hf_home and paths.secrets of this cluster file")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    check_recipe(recipe)
    if options.cluster:
        _use_cluster(options.cluster)
    wanted = wanted_repositories(recipe)
    if wanted:
        hub.quiet_client()
    if not options.check and hub.is_offline():
        raise EnvironmentMismatchError("HF_HUB_OFFLINE is set: nothing can be fetched; unset it, or use --check")
    _check_pins(wanted, may_ask=not options.check)
    weights = ".safetensors" if recipe.model.weights == "pretrained" else ""
    repositories = [
        hub.Repository(kind, name, str(commit), skip, needs=weights if kind == "model" else "")
        for _, kind, name, commit, skip in wanted
    ]
    say = _to_stderr if options.json else print
    answers = []
    for repository in repositories:
        files = hub.check(repository) if options.check else hub.fetch(repository, say)
        answers.append(_answer(repository, files))
        say(
            f"{repository.kind} {repository}: {len(files)} files, {hub.size(hub.total(files))}, every size and hash is"
            f" the hub's: {repository.snapshot}"
        )
    if not options.check:
        _prepare_data(recipe, say)
    if not repositories:
        say(f"{recipe.name}: model and data are not from the hub; nothing to {'check' if options.check else 'fetch'}")
    if options.json:
        print(json.dumps({"recipe": recipe.name, "repositories": answers}, indent=2))
    return EXIT_OK


def wanted_repositories(recipe: Recipe) -> list[tuple[str, str, str, str | None, tuple[str, ...]]]:
    """``(key of the pin, kind, id, commit, patterns to skip)`` of everything that a recipe takes from the hub.

    Raises:
        RecipeError: the tokenizer is one of the hub, which a recipe cannot pin.
    """
    found: list[tuple[str, str, str, str | None, tuple[str, ...]]] = []
    model = recipe.model
    if is_hub_id(model.source):
        skip = OTHER_WEIGHTS if model.weights == "pretrained" else (*OTHER_WEIGHTS, "*.safetensors")
        found.append(("model.revision", "model", model.source, model.revision, skip))
    if recipe.data.format != "random_tokens" and model.tokenizer and is_hub_id(model.tokenizer):
        raise RecipeError(
            f"model.tokenizer={model.tokenizer!r} cannot be pinned to a commit; leave it out for the model's own, or"
            f" run `hf download {model.tokenizer} --local-dir FOLDER` and name the folder"
        )
    for entry in (*recipe.data.train, *recipe.data.validation):
        if entry.startswith(HUB_DATA_PREFIX):
            row = ("data.revision", "dataset", _data_id(entry), recipe.data.revision, ())
            found += [] if row in found else [row]
    return found


def is_hub_id(source: str) -> bool:
    """Neither a config of the package nor a folder that is there, but ``ORG/NAME``."""
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source)
    return bool(plain) and not source.startswith(PACKAGE_PREFIX) and not Path(source).expanduser().is_dir()


def _data_id(entry: str) -> str:
    return entry.removeprefix(HUB_DATA_PREFIX).partition(":")[0]


def _check_pins(wanted: list[tuple[str, str, str, str | None, tuple[str, ...]]], *, may_ask: bool) -> None:
    """Refuse what is not pinned to a commit, and say the commit that pins it: a branch moves under a running project.

    Raises:
        RecipeError: names every key with the hub's newest commit, ready to be pasted.
    """
    loose = [(key, kind, name, given) for key, kind, name, given, _ in wanted if not COMMIT.fullmatch(given or "")]
    if not loose:
        return
    keys = ", ".join(dict.fromkeys(f"{key}={given}" if given else f"{key} is not set" for key, _, _, given in loose))
    if not may_ask:
        raise RecipeError(f"{keys}: only a commit of 40 hex digits can be checked; pin it in the recipe")
    pins = {key: hub.newest_commit(kind, name) for key, kind, name, _ in reversed(loose)}
    words = " ".join(f"--set {key}={pins[key]}" for key in sorted(pins, reverse=True))
    raise RecipeError(f"{keys}: pin the commit, in the recipe or with: {words}")


def _use_cluster(path: str) -> None:
    """Fetch into the cluster's cache, with its token. huggingface_hub reads both when it is imported."""
    from moe_recipes.config.cluster import load_cluster

    paths = load_cluster(Path(path)).paths
    if paths.hf_home:
        os.environ["HF_HOME"] = str(paths.hf_home)
        os.environ.pop("HF_HUB_CACHE", None)
    if paths.secrets and (token := read_secrets(paths.secrets).get("HF_TOKEN")):
        os.environ["HF_TOKEN"] = token


def _prepare_data(recipe: Recipe, say: Any) -> None:
    """Let ``datasets`` prepare its tables now, in the process and with the call of a training.

    Raises:
        MoeRecipesError: of the class and with the line of that process.
    """
    entries = [e for e in (*recipe.data.train, *recipe.data.validation) if e.startswith(HUB_DATA_PREFIX)]
    if not entries:
        return
    done = run_module("moe_recipes.data.fetch_hub", [str(recipe.data.revision), *entries])
    for line in done.splitlines():
        say(line)


def _answer(repository: hub.Repository, files: list[hub.HubFile]) -> dict[str, Any]:
    return {
        "kind": repository.kind,
        "id": repository.name,
        "commit": repository.commit,
        "folder": str(repository.snapshot),
        "num_files": len(files),
        "num_bytes": hub.total(files),
    }


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
