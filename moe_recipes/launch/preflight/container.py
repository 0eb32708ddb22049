"""The container: can it be started, is it the same everywhere, and does it keep the variables that the job sets?"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_recipes.config.errors import EXIT_ENVIRONMENT, EXIT_MISSING_INPUT
from moe_recipes.launch.image import record_path, sha256_of, verify_image
from moe_recipes.launch.preflight.plan import is_secret
from moe_recipes.launch.preflight.probe import Probe, failed, not_available, passed, run_tool

PYXIS_FLAGS = (
    "--container-image",
    "--container-mounts",
    "--container-workdir",
    "--container-env",
    "--no-container-mount-home",
)
SQUASHFS_MAGIC = b"hsqs"
SAMPLES, SAMPLE_BYTES = 16, 2**20
NAMES_SHOWN = 8
IDENTITY_FILES = ("usr/share/moe-recipes/sbom.json", "etc/os-release", "etc/environment")
"""Files of a root file system that differ between images; those that are there count."""

SLURM_PREFIXES = ("SLURM", "SRUN_", "PMI", "PMIX_", "OMPI_", "CUDA_VISIBLE", "GPU_DEVICE", "ROCR_")
"""Set by Slurm itself, differently for every step."""


def container_flags(runtime: str, *, srun: str = "srun") -> Probe:
    """The runtime can be started: srun knows pyxis's flags, or apptainer is on the path."""
    if runtime == "none":
        return not_available("container.runtime is none")
    if runtime == "apptainer":
        found = shutil.which("apptainer") or shutil.which("singularity")
        if found:
            return passed(found)
        return failed("no apptainer on the path of the batch host", exit_code=EXIT_ENVIRONMENT)
    done = run_tool([srun, "--help"])
    if done is None:
        return not_available("no srun on this host")
    missing = [flag for flag in PYXIS_FLAGS if flag not in done.stdout]
    if missing:
        mend = "srun has no pyxis here; install it (plugstack.conf), or set another container.runtime"
        return failed(f"srun --help lacks {', '.join(missing)}; {mend}", exit_code=EXIT_ENVIRONMENT)
    return passed(len(PYXIS_FLAGS), floor=len(PYXIS_FLAGS))


def image_file(image: str | None) -> Probe:
    """The image is there, is squashfs where its name says so, and is the file that ``image import`` recorded.

    The value is its SHA-256. Reads the whole file: about 1 s a GB.
    """
    if image is None or not image.startswith("/"):
        return not_available("no image file: the runtime fetches it" if image else "container.runtime is none")
    path = Path(image)
    if path.is_dir():
        return not_available(f"{image} is a folder; its contents are compared between nodes instead")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        mend = "import it once with `moe-recipes image import`, or mend container.image"
        return failed(f"{image}: {error.strerror}; {mend}", exit_code=EXIT_MISSING_INPUT)
    if path.suffix == ".sqsh" and magic != SQUASHFS_MAGIC:
        return failed(f"{image}: not a squashfs file; import the image again", exit_code=EXIT_MISSING_INPUT)
    if record_path(path).exists():
        return passed(verify_image(path).sha256, message="as recorded when it was imported")
    return passed(sha256_of(path), message=f"no record {record_path(path).name} to compare with")


def image_sample(image: str | None) -> str | None:
    """A hash of the image file's size and of some of its blocks, for comparing nodes without reading it all."""
    if image is None or not Path(image).is_file():
        return None
    size = Path(image).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(image, "rb") as file:
        for index in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def root_identity(root: str = "/") -> str:
    """A hash of what tells one root file system from another."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        path = Path(root) / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:16]


def environment_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """A short hash of every variable's value, for comparing inside with outside; of secrets the names alone."""
    return {
        name: "" if is_secret(name) else hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:16]
        for name, value in environ.items()
    }


def environment(wanted: Mapping[str, str], environ: Mapping[str, str] | None = None) -> Probe:
    """Every variable that the job sets arrives in the container with its value; the value lists those that do not.

    An image's own environment beats the job's, unless the name is passed on explicitly.
    """
    inside = os.environ if environ is None else environ
    missing = sorted(name for name in wanted if name not in inside)
    other = sorted(name for name in wanted if name in inside and inside[name] != wanted[name])
    if missing or other:
        said = [f"not set: {_names(missing)}"] if missing else []
        said += [f"another value than the job's: {_names(other)}"] if other else []
        mend = "the image overrides them; name them in container.env"
        return failed(f"{'; '.join(said)}; {mend}", value={"missing": missing, "differ": other}, floor=len(wanted))
    return passed(len(wanted), floor=len(wanted))


def environment_difference(outside: Mapping[str, str], inside: Mapping[str, str]) -> Probe:
    """Which names differ between the node and the container on it: to be read, and no fault by itself.

    Args:
        outside, inside: as ``environment_facts`` gives them.
    """
    pairs = {"only outside": outside.keys() - inside.keys(), "only inside": inside.keys() - outside.keys()}
    pairs["differ"] = {name for name in outside.keys() & inside.keys() if outside[name] != inside[name]}
    value = {what: sorted(n for n in names if not n.startswith(SLURM_PREFIXES)) for what, names in pairs.items()}
    return passed(value, message="; ".join(f"{what}: {_names(names)}" for what, names in value.items() if names))


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more}"
