"""The cluster file: a site's facts, as frozen data. A recipe says what to train, a cluster file says where.

It is YAML like a recipe: unknown keys, wrong types and missing keys are errors with ``file:line``, and ``extends``
works. ``clusters/example.yaml`` and docs/clusters.md explain every key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moe_recipes.config.errors import MissingInputError, RecipeError
from moe_recipes.config.resolve import from_tree, to_plain
from moe_recipes.config.yaml_tree import Tree, read_tree

CLUSTER_SHAPE = "a cluster file is a mapping of sections (slurm, container, paths, env, limits)"
TIME_PATTERN = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<hours>\d{1,2}):(?P<minutes>\d{2}):(?P<seconds>\d{2})")
SECRET_ENDINGS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclass(frozen=True, kw_only=True)
class SlurmSite:
    """What a job asks Slurm for."""

    partition: str
    """Partition, or several with commas between them."""

    account: str | None = None
    qos: str | None = None
    reservation: str | None = None

    gpus_per_node: int
    """GPUs of a node; 0 on nodes without."""

    gpu_type: str | None = None
    """The type in Slurm's gres, for ``--gpus-per-node=TYPE:N``."""

    cpus_per_task: int = 1
    """CPU cores of a task; a task drives one GPU."""

    mem: str | None = None
    """Memory of a node as Slurm writes it; ``"0"`` is all of it."""

    exclusive: bool = True
    """No other job on the nodes."""

    time: str
    """Time limit, ``D-HH:MM:SS`` or ``HH:MM:SS``."""

    extra: tuple[str, ...] = ()
    """Further sbatch options, each as one text: ``--constraint=h100``."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """What the tasks run in."""

    runtime: Literal["pyxis", "apptainer", "none"]
    image: str | None = None
    """pyxis: the absolute path of a ``.sqsh``, or ``REGISTRY#NAME:TAG``. apptainer: a ``.sif`` or a folder."""

    mounts: tuple[str, ...] = ()
    """``SOURCE:TARGET`` or ``SOURCE:TARGET:ro``. The repository, the runs and the Hugging Face home are mounted
    anyway."""

    workdir: str | None = None
    """Where the tasks start; the repository if not given, whose code then runs. Elsewhere it is the image's code."""

    python: str = "python3"
    """Python inside the container; for ``none`` that of the nodes."""

    writable: bool = False
    """The image's root file system may be written, for the time of the step."""

    env: tuple[str, ...] = ()
    """Further variables whose value in the job must beat the image's."""

    command: tuple[str, ...] = ()
    """apptainer: the words up to its options, if not ``apptainer exec --nv --no-home``."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Folders and files that every node sees under the same path."""

    runs: str
    """Where runs live whose recipe names no ``run_dir``."""

    hf_home: str | None = None
    """``HF_HOME`` of the job: models and data that were fetched before."""

    secrets: str | None = None
    """File with keys for W&B and Hugging Face, mode 0600."""

    excluded_nodes: str | None = None
    """Bad nodes, with reason and expiry; ``RUNS/excluded_nodes.json`` if not given."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to give up, and what is too slow."""

    max_restarts_without_progress: int = 3
    """Restarts without a newer durable checkpoint after which the job is held, with exit code 93."""

    exclude_hours: float = 24.0
    """How long a bad node is left out."""

    hang_s: float | None = None
    """Seconds without a step that count as a hang; from the measured step, and at least 600, if not given."""

    hang_start_s: float = 3600.0
    """The same before the first step of a start: loading and compiling take long."""

    hang_save_s: float = 3600.0
    """The same while a checkpoint or an export is being written."""

    preflight: bool = False
    """Ask all nodes before every start of a run; docs/preflight.md."""

    all_reduce_gb_per_s: float | None = None
    """Preflight: least bus bandwidth of an all-reduce over all ranks, in 10^9 bytes a second."""

    all_to_all_gb_per_s: float | None = None
    """Preflight: least bandwidth of an all-to-all over all ranks, a rank, in 10^9 bytes a second."""

    checkpoint_gb_per_s: float | None = None
    """Preflight: least rate at which a node writes to the runs' file system, in 10^9 bytes a second."""

    shm_gib: float | None = None
    """Preflight: least size of /dev/shm inside the container."""

    time_skew_s: float = 1.0
    """Preflight: most that the clocks of two nodes may differ."""

    used_gpu_memory_mib: float = 1024.0
    """Preflight: most memory that a GPU may have in use before the job."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    name: str
    slurm: SlurmSite
    container: Container
    paths: Paths
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every task: network interfaces, NCCL, NVSHMEM. Never keys."""

    limits: Limits = field(default_factory=Limits)

    @property
    def excluded_nodes(self) -> Path:
        """The file of bad nodes."""
        return Path(self.paths.excluded_nodes or Path(self.paths.runs) / "excluded_nodes.json")

    @property
    def time_limit_s(self) -> int:
        return parse_time(self.slurm.time)


def load_cluster(path: str | Path) -> Cluster:
    """The cluster of a file, checked. ``~`` and ``$VARIABLE`` in ``paths``, ``container.image`` and ``mounts`` are
    replaced.

    Raises:
        MissingInputError: there is no such file.
        RecipeError: with ``file:line``, for anything else that is wrong with it.
    """
    if not Path(path).is_file():
        raise MissingInputError(
            f"{str(path) or repr('')}: no such cluster file; write it with `moe-recipes cluster init`, or name another"
            " (MOE_CLUSTER, --cluster)"
        )
    tree = read_tree(Path(path), shape=CLUSTER_SHAPE)
    return _cluster(tree)


def cluster_from_dict(data: Mapping[str, Any], source: str) -> Cluster:
    """The cluster of plain data, as ``cluster_to_dict`` makes it; as strict as a file."""
    return _cluster(Tree(value=dict(data), origin=source))


def cluster_to_dict(cluster: Cluster) -> dict[str, Any]:
    """Plain data with every key, defaults included."""
    plain: dict[str, Any] = to_plain(cluster)
    return plain


def _cluster(tree: Tree) -> Cluster:
    cluster = from_tree(Cluster, tree)
    paths: dict[str, Any] = {
        name: None if value is None else _expand(value, tree.where(("paths", name)))
        for name, value in to_plain(cluster.paths).items()
    }
    mounts = tuple(_expand(mount, tree.where(("container", "mounts"))) for mount in cluster.container.mounts)
    image = cluster.container.image and _expand(cluster.container.image, tree.where(("container", "image")))
    cluster = replace(
        cluster, paths=replace(cluster.paths, **paths), container=replace(cluster.container, mounts=mounts, image=image)
    )
    check_cluster(cluster, tree)
    return cluster


def _expand(text: str, where: str) -> str:
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise RecipeError(f"{where}: {text!r} names a variable that is not set; set it or write the value")
    return expanded


def check_cluster(cluster: Cluster, tree: Tree | None = None) -> None:
    """Accept the cluster or say which key is wrong.

    Args:
        tree: where its keys were written, for ``file:line``.
    Raises:
        RecipeError: names the key, its value and a way to mend it.
    """
    origin = tree or Tree(value={}, origin=cluster.name)
    for key, problem in _problems(cluster):
        raise RecipeError(f"{origin.where(tuple(key.split('.')))}: {key} {problem}")


def _problems(cluster: Cluster) -> list[tuple[str, str]]:
    """``(key, what is wrong and how to mend it)``."""
    slurm, limits = cluster.slurm, cluster.limits
    found = [
        (f"{section}.{key}", f"= {value} must be at least {least}")
        for section, key, value, least in (
            ("slurm", "gpus_per_node", slurm.gpus_per_node, 0),
            ("slurm", "cpus_per_task", slurm.cpus_per_task, 1),
            ("limits", "max_restarts_without_progress", limits.max_restarts_without_progress, 1),
            ("limits", "exclude_hours", limits.exclude_hours, 0),
            ("limits", "hang_s", limits.hang_s if limits.hang_s is not None else 1, 1),
            ("limits", "hang_start_s", limits.hang_start_s, 1),
            ("limits", "hang_save_s", limits.hang_save_s, 1),
            ("limits", "time_skew_s", limits.time_skew_s, 0),
        )
        if value < least
    ]
    match = TIME_PATTERN.fullmatch(slurm.time)
    if match is None or int(match["minutes"]) > 59 or int(match["seconds"]) > 59 or parse_time(slurm.time) == 0:
        found.append(("slurm.time", f"= {slurm.time!r} must be D-HH:MM:SS or HH:MM:SS, in quotes"))
    for key in ("partition", "account", "qos", "reservation", "gpu_type", "mem"):
        # They become words of a batch script: a line's end in one would begin a command of its own.
        if (value := getattr(slurm, key)) is not None and not re.fullmatch(r"[\w.,:@%+-]+", value):
            found.append((f"slurm.{key}", f"= {value!r} must be one word of letters, digits and .,:@%+-_"))
    for option in slurm.extra:
        if not re.fullmatch(r"--[a-z][a-z-]+(=\S.*)?", option):
            found.append(("slurm.extra", f"has {option!r}; write --option or --option=value"))
    found += [*_text_problems(cluster), *_container_problems(cluster), *_path_problems(cluster)]
    found += _env_problems(cluster)
    return found


def _text_problems(cluster: Cluster) -> list[tuple[str, str]]:
    """Control characters and empty words, which no command line can carry."""
    texts = [
        (f"{section}.{key}", value)
        for section in ("slurm", "container", "paths")
        for key, values in to_plain(getattr(cluster, section)).items()
        for value in (values if isinstance(values, list | tuple) else [values])
        if isinstance(value, str)
    ]
    found = [
        (key, f"has {value!r}; write it without control characters") for key, value in texts if not value.isprintable()
    ]
    if not cluster.container.python:
        found.append(("container.python", "= '' must name a program; leave it out for python3"))
    return found


def _container_problems(cluster: Cluster) -> list[tuple[str, str]]:
    container = cluster.container
    if container.runtime == "none":
        ignored = [key for key in ("image", "mounts", "writable", "env", "command") if getattr(container, key)]
        return [(f"container.{key}", "has no meaning with container.runtime: none; remove it") for key in ignored]
    found = []
    if container.image is None:
        found.append(("container.image", f"is missing; container.runtime: {container.runtime} needs one"))
    elif not container.image.startswith("/") and (
        container.runtime == "apptainer" or "/" in container.image.split("#")[0]
    ):
        mend = (
            "write an absolute path, or REGISTRY#NAME:TAG" if container.runtime == "pyxis" else "write an absolute path"
        )
        found.append(("container.image", f"= {container.image!r} is neither; {mend}"))
    if container.runtime == "pyxis" and container.command:
        found.append(("container.command", "has no meaning with container.runtime: pyxis; remove it"))
    for mount in container.mounts:
        parts = mount.split(":")
        if len(parts) not in (2, 3) or not all(part.startswith("/") for part in parts[:2]) or "," in mount:
            found.append(("container.mounts", f"has {mount!r}; write /source:/target or /source:/target:ro, no comma"))
    return found


def _path_problems(cluster: Cluster) -> list[tuple[str, str]]:
    return [
        (f"paths.{key}", f"= {value!r} must be an absolute path that every node sees")
        for key, value in to_plain(cluster.paths).items()
        if value is not None and not value.startswith("/")
    ] + [
        (f"container.{key}", f"= {value!r} must be an absolute path")
        for key, value in (("workdir", cluster.container.workdir),)
        if value is not None and not value.startswith("/")
    ]


def _env_problems(cluster: Cluster) -> list[tuple[str, str]]:
    found = []
    for name in (*cluster.env, *cluster.container.env):
        key = f"env.{name}" if name in cluster.env else "container.env"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            found.append((key, f"names {name!r}, which is no variable name"))
        elif name.upper().endswith(SECRET_ENDINGS):
            found.append((key, f"names {name}; keys belong into the file of paths.secrets"))
        elif name.startswith(("SLURM_", "SBATCH_")):
            found.append((key, f"names {name}; Slurm sets its own variables"))
    found += [(f"env.{name}", "must be one line") for name, value in cluster.env.items() if "\n" in value]
    return found


def parse_time(text: str) -> int:
    """Seconds of a time limit as Slurm writes it.

    Raises:
        RecipeError: the text is no such time.
    """
    match = TIME_PATTERN.fullmatch(text)
    if match is None:
        raise RecipeError(f"{text!r} is no time; write D-HH:MM:SS or HH:MM:SS")
    days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
