"""The one srun of an attempt: which tasks, with which variables, in which container.

Tasks get every GPU of their node and pick one by LOCAL_RANK: with a GPU a task the peers could not reach each other's
memory. Variables go by name (``--export=NAMES``), so that values may hold commas and nothing else of the batch
script's environment comes along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moe_recipes.config.cluster import Cluster
from moe_recipes.config.errors import InfrastructureError
from moe_recipes.launch.shakedown import kill_environment
from moe_recipes.launch.slurm.commands import JobFacts, clean_environment
from moe_recipes.launch.slurm.spec import JobSpec

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Ports for rank 0, by job id: below 32768, where Linux begins to hand out ports of its own."""

HOST_VARIABLES = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF")
"""What a task keeps of the host's environment; an image's own value wins."""

APPTAINER = ("apptainer", "exec", "--nv", "--no-home")


def srun_command(spec: JobSpec, job: JobFacts, *, attempt: Path) -> list[str]:
    """The words of srun for one attempt. Start them with ``srun_environment``.

    Args:
        attempt: ``RUN/attempts/<n>``, absolute.
    """
    names = task_environment(spec, job)
    task = ["-u", "-m", "moe_recipes.launch.slurm.task", str(spec_path(spec, job)), str(attempt)]
    return [
        "srun",
        f"--jobid={job.job_id}",
        f"--nodes={spec.num_nodes}",
        f"--ntasks={spec.num_ranks}",
        f"--ntasks-per-node={spec.tasks_per_node}",
        "--distribution=block",
        f"--cpus-per-task={spec.cluster.slurm.cpus_per_task}",
        *_gpu_flags(spec),
        "--kill-on-bad-exit=1",
        "--wait=0",
        "--mpi=none",
        "--input=none",
        "--unbuffered",
        f"--export={','.join(_exported(spec, names))}",
        *container_flags(spec, tuple(names)),
        *container_command(spec),
        spec.cluster.container.python,
        *task,
    ]


def _exported(spec: JobSpec, names: Mapping[str, str]) -> list[str]:
    """The variables that srun hands on: all of the job's, and what stands on the host under these names."""
    asked = (*HOST_VARIABLES, *names, *_apptainer_names(spec, names), *spec.cluster.container.env)
    return list(dict.fromkeys(asked))


def spec_path(spec: JobSpec, job: JobFacts) -> Path:
    """Where the job's spec lies: ``RUN/slurm/<job>/spec.json``."""
    return Path(spec.run_dir) / "slurm" / job.job_id / "spec.json"


def _gpu_flags(spec: JobSpec) -> list[str]:
    slurm = spec.cluster.slurm
    if slurm.gpus_per_node == 0:
        return []
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    return [f"--gres=gpu:{kind}{spec.gpus_per_node}"]


def srun_environment(spec: JobSpec, job: JobFacts, environ: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of the srun process: the host's without another job's variables, and the tasks'."""
    names = task_environment(spec, job)
    return {**clean_environment(environ), **names, **_apptainer_names(spec, names)}


def task_environment(spec: JobSpec, job: JobFacts) -> dict[str, str]:
    """What every task is told, apart from its number. The cluster's ``env`` wins over everything but the addresses.

    Raises:
        InfrastructureError: the job has no nodes.
    """
    if not job.nodes:
        raise InfrastructureError(f"job {job.job_id} is {job.state} and has no nodes")
    cluster = spec.cluster
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cluster.slurm.cpus_per_task * spec.tasks_per_node // spec.gpus_per_node)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cluster.paths.hf_home is not None:
        defaults["HF_HOME"] = cluster.paths.hf_home
    if cluster.container.runtime != "none":
        # The image's home is read-only or absent; caches of kernels and of W&B go where every image can write.
        defaults["HOME"] = "/tmp"
    number = int(re.sub(r"\D", "", job.job_id) or 0)
    kill = kill_environment(spec.folder, num_ranks=spec.num_ranks, job_id=number) if spec.shakedown else {}
    return {
        **defaults,
        **cluster.env,
        **kill,
        # Not MASTER_ADDR itself: enroot's hook for PyTorch images sets that and the ranks anew inside the container.
        "MOE_MASTER_ADDR": job.nodes[0],
        "MOE_MASTER_PORT": str(FIRST_PORT + number % NUM_PORTS),
        "MOE_JOB_ID": job.job_id,
        "MOE_RESTART_COUNT": str(job.restart_count),
    }


def container_flags(spec: JobSpec, names: tuple[str, ...]) -> list[str]:
    """srun's own flags for the container: pyxis's, or the working folder.

    Args:
        names: variables whose value in the job must beat the image's.
    """
    container = spec.cluster.container
    if container.runtime != "pyxis":
        return [f"--chdir={spec.code_dir}"]
    flags = [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts(spec))}",
        f"--container-workdir={container.workdir or spec.code_dir}",
        f"--container-env={','.join(dict.fromkeys([*names, *container.env]))}",
        "--no-container-mount-home",
    ]
    return [*flags, "--container-writable"] if container.writable else flags


def container_command(spec: JobSpec) -> list[str]:
    """The words between srun's flags and Python: apptainer's, or none."""
    container = spec.cluster.container
    if container.runtime != "apptainer":
        return []
    binds = [word for mount in mounts(spec) for word in ("--bind", mount)]
    writable = ["--writable-tmpfs"] if container.writable else []
    workdir = container.workdir or spec.code_dir
    return [*(container.command or APPTAINER), *binds, *writable, "--pwd", workdir, str(container.image)]


def mounts(spec: JobSpec) -> list[str]:
    """``SOURCE:TARGET[:ro]``, what the job itself needs first; a path that lies in another one is mounted with it."""
    cluster = spec.cluster
    asked = {mount.split(":")[1] for mount in cluster.container.mounts}
    own = (cluster.paths.runs, spec.run_dir, cluster.paths.hf_home, spec.code_dir)
    needed = list(dict.fromkeys(path for path in own if path is not None and path not in asked))
    wanted = [path for path in needed if not _inside(path, [other for other in needed if other != path])]
    secrets = [f"{path}:{path}:ro" for path in _secrets(cluster) if not _inside(path, wanted)]
    return [*(f"{path}:{path}" for path in wanted), *secrets, *cluster.container.mounts]


def _secrets(cluster: Cluster) -> list[str]:
    return [cluster.paths.secrets] if cluster.paths.secrets is not None else []


def _inside(path: str, folders: list[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _apptainer_names(spec: JobSpec, names: Mapping[str, str]) -> dict[str, str]:
    """apptainer lets APPTAINERENV_X beat the image's X; its --env would split a value at commas."""
    if spec.cluster.container.runtime != "apptainer":
        return {}
    return {f"APPTAINERENV_{name}": value for name, value in names.items()}
