"""The verb ``cluster``: write a cluster file from what Slurm says of this site, or check one."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moe_recipes.config.cluster import Cluster, cluster_to_dict, load_cluster
from moe_recipes.config.errors import EXIT_OK, CannotWriteError, MoeRecipesError, RecipeError
from moe_recipes.config.yaml_tree import write_yaml
from moe_recipes.launch.arguments import CODE_DIR, DEFAULT_CLUSTER, add_json
from moe_recipes.launch.slurm.commands import NodeFacts, nodes_of_partition, run_slurm, slurm_command

LONGEST = "1-00:00:00"
"""Time limit to write for a partition that has none."""

NO_IMAGE = "/path/to/moe-recipes.sqsh"
"""Stands in the file until the operator names an image."""

TEMPLATE = """\
# Facts of this site, found by `moe-recipes cluster init`. clusters/example.yaml explains every key.
slurm:
  partition: {partition}
  account: {account}
  gpus_per_node: {gpus}
  gpu_type: {gpu_type}
  cpus_per_task: {cpus}
  mem: "0"
  exclusive: true
  time: "{time}"

container:
  runtime: {runtime}
{image}
paths:
  runs: {runs}
{hf_home}
# Network interfaces and libraries, as this site needs them, for example:
# env:
#   NCCL_SOCKET_IFNAME: eth0
#   NCCL_IB_HCA: mlx5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="init | check", required=True)
    init = actions.add_parser("init", help="write a cluster file from sinfo and scontrol")
    init.add_argument("--output", default=str(CODE_DIR / DEFAULT_CLUSTER), metavar="FILE")
    init.add_argument("--partition", help="the partition to use; Slurm's default one if not given")
    init.add_argument("--image", metavar="PATH", help="the container image, absolute")
    init.add_argument("--runs", metavar="FOLDER", help="where runs live, on a file system that all nodes share")
    init.add_argument("--force", action="store_true", help="replace the file if it is there")
    check = actions.add_parser("check", help="check a cluster file and print it with its defaults")
    check.add_argument("file", metavar="FILE")
    for action in (init, check):
        add_json(action)


def run(options: argparse.Namespace) -> int:
    if options.action == "check":
        plain = cluster_to_dict(load_cluster(options.file))
        print(json.dumps(plain, indent=2) if options.json else write_yaml(plain), end="\n" if options.json else "")
        return EXIT_OK
    output = Path(options.output)
    if output.exists() and not options.force:
        raise RecipeError(f"{output} is there; edit it, or replace it with --force")
    text = cluster_text(options.partition or default_partition(), image=options.image, runs=options.runs)
    cluster = _write(output, text)
    if options.json:
        print(json.dumps({"file": str(output), "cluster": cluster_to_dict(cluster)}))
        return EXIT_OK
    print(f"wrote {output}; read it through and mend it")
    if cluster.container.image == NO_IMAGE:
        print("container.image has no value yet: name the .sqsh that `moe-recipes image import` made")
    print("for plain sbatch, which reads no cluster file before it has submitted:")
    for name in ("partition", "account"):
        if (value := getattr(cluster.slurm, name)) is not None:
            print(f"  export SBATCH_{name.upper()}={value}")
    return EXIT_OK


def _write(output: Path, text: str) -> Cluster:
    temporary = output.with_name(f".{output.name}.new")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        cluster = replace(load_cluster(temporary), name=output.stem)
        temporary.replace(output)
    except OSError as error:
        raise CannotWriteError(f"{output}: cannot be written: {error.strerror}; name another --output") from error
    finally:
        with suppress(OSError):  # a read-only file system refuses this too
            temporary.unlink()
    return cluster


def default_partition() -> str:
    """The partition that sbatch takes if none is named.

    Raises:
        RecipeError: there is none.
    """
    names = slurm_command(["sinfo", "-h", "-o", "%P"]).split()
    for name in names:
        if name.endswith("*"):
            return name.removesuffix("*")
    raise RecipeError(f"Slurm has no default partition; name one with --partition: {', '.join(names)}")


def cluster_text(partition: str, *, image: str | None, runs: str | None) -> str:
    """The YAML of a cluster file for a partition. Of unlike nodes the commonest kind is described."""
    nodes = nodes_of_partition(partition)
    gpus, gpu_type, cpus = _commonest(nodes)
    runtime = container_runtime()
    hf_home = os.environ.get("HF_HOME")
    return TEMPLATE.format(
        partition=partition,
        account=default_account() or "null",
        gpus=gpus,
        gpu_type=gpu_type or "null",
        cpus=max(1, cpus // max(1, gpus)),
        time=partition_limit(partition),
        runtime=runtime,
        image="" if runtime == "none" else f"  image: {image or NO_IMAGE}\n  mounts: []\n",
        runs=runs or CODE_DIR / "runs",
        hf_home=f"  hf_home: {hf_home}\n" if hf_home else "",
    )


def _commonest(nodes: list[NodeFacts]) -> tuple[int, str | None, int]:
    """``(GPUs, their type, CPUs)`` of most nodes; nodes with GPUs count before nodes without."""
    kinds = Counter((node.gpus, node.gpu_type, node.cpus) for node in nodes)
    return max(kinds, key=lambda kind: (kind[0] > 0, kinds[kind], kind[0]))


def partition_limit(partition: str) -> str:
    """The partition's longest time as ``D-HH:MM:SS``."""
    text = slurm_command(["scontrol", "show", "partition", partition])
    match = re.search(r"\bMaxTime=(\d+-\d+:\d+:\d+|\d+:\d+:\d+)", text)
    return match[1] if match else LONGEST


def default_account() -> str | None:
    """This user's default account, where the accounting can be asked."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or ""
    try:
        done = run_slurm(["sacctmgr", "-n", "-P", "show", "user", user, "format=DefaultAccount"])
    except MoeRecipesError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def container_runtime() -> str:
    """``pyxis`` where srun has its flags, else ``apptainer`` where it is installed, else ``none``."""
    if "--container-image" in run_slurm(["srun", "--help"]).stdout:
        return "pyxis"
    return "apptainer" if shutil.which("apptainer") else "none"
