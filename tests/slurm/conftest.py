"""The test cluster, the container image and the cluster file that the tests of this folder share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.images import make_base, make_image
from tests.slurm.lab import Lab, running_lab, why_not
from tests.slurm.site import JOB_S, TRAINING, UNDISTURBED_STEPS, Run, Site

PLUGIN = Path(__file__).parent / "spank" / "standin.c"
IMAGE_ENVIRONMENT = {"PYTORCH_VERSION": "0.0.0", "OMP_NUM_THREADS": "77", "SET_BY_IMAGE": "image"}
"""What the stand-in image sets, as NVIDIA's images do: it wins over the job's unless the job says otherwise."""


def skip_or_fail(reason: str) -> None:
    """Skip the test; in CI, which has all it needs, fail instead."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must run this test", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm_folder() -> Iterator[Path]:
    """A folder under /tmp for this test session: short paths, for sockets, seen by every node."""
    if reason := why_not():
        skip_or_fail(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-tests-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def plugin(slurm_folder: Path) -> str:
    """The plugstack.conf line of the stand-in for pyxis, compiled."""
    if shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists():
        skip_or_fail("the stand-in for pyxis needs gcc and libslurm-dev")
    library, scratch, record = (slurm_folder / name for name in ("standin.so", "scratch", "record"))
    scratch.mkdir()
    record.mkdir()
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, PLUGIN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return f"required {library} scratch={scratch} record={record}"


@pytest.fixture(scope="session")
def records(slurm_folder: Path) -> Path:
    """Where the stand-in for pyxis notes the options of each task: one file JOB.STEP.RANK a task."""
    return slurm_folder / "record"


@pytest.fixture(scope="session")
def lab_of_4(plugin: str) -> Iterator[Lab]:
    with running_lab(4, plugstack=[plugin]) as lab:
        yield lab


@pytest.fixture
def lab(lab_of_4: Lab) -> Iterator[Lab]:
    """A cluster of 4 nodes with 8 fake GPUs each, all idle; what the test leaves behind is cancelled."""
    yield lab_of_4
    lab_of_4.cancel_all()


@pytest.fixture
def lab16(plugin: str) -> Iterator[Lab]:
    """A cluster of 16 nodes with 8 fake GPUs each."""
    with running_lab(16, plugstack=[plugin]) as lab:
        yield lab


@pytest.fixture(scope="session")
def base(slurm_folder: Path) -> Path:
    """The root file system of the stand-in image."""
    if shutil.which("mmdebstrap") is None or shutil.which("mksquashfs") is None:
        skip_or_fail("the stand-in image needs mmdebstrap and squashfs-tools")
    return make_base(slurm_folder)


@pytest.fixture(scope="session")
def image(base: Path, slurm_folder: Path) -> Path:
    """The stand-in image as a squashfs file, with an environment of its own."""
    lines = "".join(f"{name}={value}\n" for name, value in IMAGE_ENVIRONMENT.items())
    (base / "etc" / "environment").write_text(lines)
    return make_image(base, slurm_folder / "image.sqsh")


@pytest.fixture
def site(lab: Lab, image: Path, slurm_folder: Path, request: pytest.FixtureRequest) -> Site:
    """The lab with a cluster file and an empty folder for the runs of one test."""
    name = "".join(letter for letter in request.node.name if letter.isalnum() or letter == "_")[:40]
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=slurm_folder))
    return Site(lab, image, folder)


@pytest.fixture(scope="session")
def undisturbed(lab_of_4: Lab, image: Path, slurm_folder: Path) -> Run:
    """A run that nothing happened to, submitted with ``moe-recipes launch``: what the others must equal bit for bit."""
    site = Site(lab_of_4, image, slurm_folder / "undisturbed")
    words = [word for override in (*TRAINING, f"train.steps={UNDISTURBED_STEPS}") for word in ("--set", override)]
    job = json.loads(site.launch("tiny_slurm", "--nodes=2", "--json", *words).stdout)["job"]
    lab_of_4.wait_for_state(job, "COMPLETED", JOB_S)
    return site.run("tiny_slurm")
