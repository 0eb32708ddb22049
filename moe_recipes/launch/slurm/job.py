"""What `moe-recipes launch` and a plain `sbatch slurm/x.sh` share: the spec, its checks, and the job itself.

Both end in the same submitit job, ``run_job(spec)``, on the batch host: requeue, logs and status are the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moe_recipes.config.checks import check_recipe
from moe_recipes.config.cluster import Cluster
from moe_recipes.config.errors import EXIT_OK, CannotWriteError, MoeRecipesError, RecipeError
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import load_recipe, recipe_to_dict
from moe_recipes.config.run_folder import RunFolder, check_run
from moe_recipes.launch.arguments import CODE_DIR
from moe_recipes.launch.shakedown import Mode, shakedown_recipe
from moe_recipes.launch.slurm.spec import WORKS, JobSpec, Work, read_spec, write_spec
from moe_recipes.launch.words import ERROR_PREFIX

EXPORTED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "MOE_CLUSTER",
    "MOE_SHAKEDOWN",
    "MOE_WORK",
    "MOE_PYTHON",
)
"""What a job keeps of the submitting shell: keys that were exported there stay there."""

BACKSTOP_S = 120
"""Slurm's own signal before the time limit, to the batch script; the supervisor's comes earlier, as measured."""

SITE_NAMES = ("partition", "account", "qos")


def make_spec(
    recipe_file: str,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    work: Work,
    shakedown: Mode,
    num_nodes: int | None = None,
    tasks_per_node: int | None = None,
    time_limit_s: int | None = None,
    bench_words: Sequence[str] = (),
) -> JobSpec:
    """The spec of a recipe on a cluster, checked as far as a host without the model and without torch can.

    Args:
        recipe_file: a recipe, or for ``export`` the folder of a run.
        num_nodes: nodes of the job; as few as the cluster's GPUs allow, if not given.
        tasks_per_node: as the allocation has them; the recipe's ranks over the nodes, if not given.
    Raises:
        RecipeError: recipe and cluster, or recipe and allocation, do not fit.
    """
    recipe = _read_recipe(recipe_file, overrides, work)
    check_recipe(recipe)
    ranks = num_nodes * tasks_per_node if num_nodes is not None and tasks_per_node is not None else None
    if shakedown != "off":
        narrow = shakedown == "narrow"
        recipe = shakedown_recipe(recipe, narrow=narrow, num_ranks=ranks if narrow else None)
    if work == "bench":
        recipe = replace(recipe, run_dir=str(Path(cluster.paths.runs) / f"bench_{recipe.name}"))
    elif recipe.run_dir is None:
        recipe = replace(recipe, run_dir=str(Path(cluster.paths.runs) / recipe.name))
    recipe = replace(recipe, run_dir=os.path.abspath(CODE_DIR / str(recipe.run_dir)))
    if work == "bench":
        num_nodes, tasks_per_node = _one_task(recipe, cluster, num_nodes, tasks_per_node)
    else:
        num_nodes, tasks_per_node = _layout(recipe, cluster, num_nodes, tasks_per_node, must_match=work != "preflight")
    return JobSpec(
        work=work,
        recipe=recipe_to_dict(recipe),
        recipe_file=recipe_file,
        overrides=tuple(overrides),
        cluster=cluster,
        run_dir=str(recipe.run_dir),
        num_nodes=num_nodes,
        tasks_per_node=tasks_per_node,
        shakedown=shakedown != "off",
        code_dir=str(CODE_DIR),
        time_limit_s=cluster.time_limit_s if time_limit_s is None else time_limit_s,
        bench_words=tuple(bench_words),
    )


def _read_recipe(recipe_file: str, overrides: Sequence[str], work: Work) -> Recipe:
    if work != "export":
        return load_recipe(recipe_file, overrides)
    folder = RunFolder(os.path.abspath(recipe_file))
    return replace(folder.read_recipe(tuple(overrides)), run_dir=str(folder.path))


def _one_task(recipe: Recipe, cluster: Cluster, num_nodes: int | None, tasks_per_node: int | None) -> tuple[int, int]:
    """One node with one task, which starts the ranks of each arm itself."""
    if (num_nodes, tasks_per_node) not in ((1, 1), (None, None)):
        raise RecipeError(
            f"a benchmark is one task on one node, but the job has {num_nodes} nodes x {tasks_per_node} tasks; give"
            " sbatch --nodes=1 --ntasks-per-node=1"
        )
    ranks, gpus = recipe.parallel.num_ranks, cluster.slurm.gpus_per_node
    if gpus and ranks > gpus:
        raise RecipeError(
            f"the recipe has {ranks} ranks, but cluster {cluster.name!r} has slurm.gpus_per_node: {gpus}; a benchmark"
            " runs on one node: --set another layout"
        )
    return 1, 1


def _layout(
    recipe: Recipe, cluster: Cluster, num_nodes: int | None, tasks_per_node: int | None, *, must_match: bool
) -> tuple[int, int]:
    """``(nodes, tasks a node)``, one task a rank; a preflight may look at fewer nodes than the recipe needs."""
    ranks, gpus = recipe.parallel.num_ranks, cluster.slurm.gpus_per_node
    keys = "parallel.fsdp_size * parallel.dp_replicate_size"
    if num_nodes is not None and tasks_per_node is not None:
        if must_match and num_nodes * tasks_per_node != ranks:
            raise RecipeError(
                f"the job has {num_nodes} nodes x {tasks_per_node} tasks = {num_nodes * tasks_per_node}, but the recipe"
                f" has {keys} = {ranks} ranks; give sbatch other --nodes and --ntasks-per-node, or --set the layout"
            )
    elif num_nodes is not None and gpus and not must_match:
        tasks_per_node = gpus
    else:
        num_nodes = num_nodes or -(-ranks // max(gpus, 1) if gpus else 1)
        tasks_per_node = ranks // num_nodes
        if num_nodes * tasks_per_node != ranks:
            raise RecipeError(
                f"{keys} = {ranks} ranks do not go evenly on {num_nodes} nodes; give --nodes, or another layout"
            )
    if gpus and tasks_per_node > gpus:
        raise RecipeError(
            f"{tasks_per_node} tasks a node need as many GPUs, but cluster {cluster.name!r} has slurm.gpus_per_node:"
            f" {gpus}; take more nodes (--nodes)"
        )
    return num_nodes, tasks_per_node


def work_of(environ: Mapping[str, str], default: Work = "train") -> Work:
    """The work that ``MOE_WORK`` asks for.

    Raises:
        RecipeError: there is no such work.
    """
    asked = environ.get("MOE_WORK", "") or default
    for work in WORKS:
        if asked == work:
            return work
    raise RecipeError(f"MOE_WORK={asked!r} must be one of {', '.join(WORKS)}")


def check_site(cluster: Cluster, given: Mapping[str, str | None], *, job: str | None) -> None:
    """Refuse a partition, account or QOS that is not the cluster file's: the rest of the file would not fit either.

    Args:
        given: by name; None where nothing was asked.
        job: the job that has them; None for the ``SBATCH_*`` variables of a shell.
    Raises:
        RecipeError: names both values.
    """
    for name in SITE_NAMES:
        wanted, asked = getattr(cluster.slurm, name), given.get(name)
        if wanted is None or asked is None or asked in wanted.split(","):
            continue
        has = f"SBATCH_{name.upper()}={asked}" if job is None else f"job {job} has {name} {asked!r}"
        mend = "unset the variable" if job is None else f"submit with --{name}={wanted}"
        raise RecipeError(
            f"{has}, but cluster {cluster.name!r} says slurm.{name}: {wanted}; {mend}, or take another cluster file"
            " (MOE_CLUSTER, --cluster)"
        )


def prepare_folders(spec: JobSpec) -> Path:
    """Make ``RUN/slurm`` (0700) and the runs' folder, and refuse a run that was started with another recipe.

    Returns:
        ``RUN/slurm``.
    Raises:
        CannotWriteError, RecipeError: as ``check_run``.
    """
    if spec.work in ("train", "probe") and not spec.shakedown:  # a new shakedown clears what an old one has left
        check_run(spec.read_recipe(), spec.folder)
    folder = Path(spec.run_dir) / "slurm"
    try:
        Path(spec.cluster.paths.runs).mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise CannotWriteError(
            f"{folder}: cannot be made: {error.strerror}; free space, or set another run_dir or paths.runs"
        ) from error
    return folder


def run_job(given: str) -> int:
    """The submitit job: runs on the batch host, outside the container, at every start of the job.

    Args:
        given: the spec's file as it was submitted; ``RUN/slurm/<job>/spec.json`` once the job has started.
    Raises:
        SystemExit: with the code of the contract, if it is not 0: the batch script ends with it.
    """
    from moe_recipes.launch.slurm.supervise import supervise

    path = Path(given)
    if path.name != "spec.json":
        own = path.parent / os.environ["SLURM_JOB_ID"] / "spec.json"
        try:
            if not own.exists():
                write_spec(own, read_spec(path))
        except MoeRecipesError as error:
            print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from error
        path.unlink(missing_ok=True)
        path = own
    code: int = supervise(str(path))
    if code != EXIT_OK:
        raise SystemExit(code)
    return code
