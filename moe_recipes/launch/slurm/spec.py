"""What one job does, as plain data in a file that the batch host and every task read."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moe_recipes.config.cluster import Cluster, cluster_from_dict, cluster_to_dict
from moe_recipes.config.errors import CannotWriteError, CorruptCheckpointError, MissingInputError
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import RunFolder

SPEC_SCHEMA_VERSION = 2
Work = Literal["train", "export", "preflight", "probe", "bench"]
WORKS: tuple[Work, ...] = get_args(Work)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job: the work, the recipe it is about, and where it runs."""

    work: Work
    recipe: dict[str, Any]
    """The resolved recipe, as ``recipe_to_dict`` makes it; ``run_dir`` is absolute."""

    recipe_file: str
    """What the user named, for messages."""

    overrides: tuple[str, ...]
    cluster: Cluster
    run_dir: str
    """Absolute; the same path on every node and in the container."""

    num_nodes: int
    tasks_per_node: int
    shakedown: bool
    code_dir: str
    """Root of the repository, absolute."""

    time_limit_s: int
    bench_words: tuple[str, ...] = ()
    """What follows the recipe in the command of a benchmark."""

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.tasks_per_node

    @property
    def gpus_per_node(self) -> int:
        """GPUs that a node's tasks use: one each, but a benchmark's only task starts the ranks of its arms itself."""
        return self.read_recipe().parallel.num_ranks if self.work == "bench" else self.tasks_per_node

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_dir)

    def read_recipe(self) -> Recipe:
        """The recipe itself.

        Raises:
            RecipeError: the file was made by another version of this package.
        """
        return recipe_from_dict(self.recipe, source=self.recipe_file)


def write_spec(path: str | Path, spec: JobSpec) -> None:
    """Write the spec with mode 0600, at once or not at all. Its folder is made with mode 0700 if it is not there.

    Raises:
        CannotWriteError: with the file and the system's reason.
    """
    path = Path(path)
    plain = {
        "schema_version": SPEC_SCHEMA_VERSION,
        **{name: getattr(spec, name) for name in spec.__dataclass_fields__},
        "cluster": cluster_to_dict(spec.cluster),
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(plain, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CannotWriteError(f"{path}: cannot be written: {error.strerror or error}; free space there") from error


def read_spec(path: str | Path) -> JobSpec:
    """The spec of a file.

    Raises:
        MissingInputError: there is no such file, or it cannot be read.
        CorruptCheckpointError: it holds something else.
    """
    try:
        plain = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise MissingInputError(f"{path}: {error.strerror}; submit the job again") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: not valid JSON: {error}; submit the job again") from error
    version = plain.pop("schema_version", None) if isinstance(plain, dict) else None
    if not isinstance(plain, Mapping) or version != SPEC_SCHEMA_VERSION or {*plain} != {*JobSpec.__dataclass_fields__}:
        raise CorruptCheckpointError(f"{path}: made by another version of moe-recipes; submit the job again")
    fields = dict(plain)
    fields["cluster"] = cluster_from_dict(fields["cluster"], source=str(path))
    for name in ("overrides", "bench_words"):
        fields[name] = tuple(fields[name])
    return JobSpec(**fields)
