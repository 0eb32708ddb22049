"""A small stand-in for the container's base image: a root file system with Python and no torch.

It is made from the machine's own Debian mirror in about four seconds. Torch is not put in: the packages of the Python
that runs the tests are mounted, read-only, at the place where a base image keeps its own (``PACKAGES_IN_IMAGE``), so
packages that an image installs into its virtual environment come first, as they do on the real base.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

PACKAGES = (
    "base-files base-passwd bash coreutils dash findutils grep hostname libc-bin libgomp1 libstdc++6 passwd python3 "
    "sed tar"
).split()
PYTHON = f"python{sysconfig.get_python_version()}"
PACKAGES_IN_IMAGE = f"/usr/local/lib/{PYTHON}/dist-packages"
MKSQUASHFS = ("-comp", "zstd", "-Xcompression-level", "1", "-noappend", "-quiet", "-no-progress")


class Source(NamedTuple):
    """Where the machine's own apt fetches its release from."""

    uri: str
    codename: str


def tests_packages() -> Path:
    """The site-packages of the Python that runs the tests: what is mounted at ``PACKAGES_IN_IMAGE``."""
    return Path(sysconfig.get_path("purelib")).resolve()


def mount_of_packages() -> str:
    """The mount in the form of ``--container-mounts``."""
    return f"{tests_packages()}:{PACKAGES_IN_IMAGE}:ro"


def machine_source() -> Source:
    """The main archive of this Debian or Ubuntu, from apt's own list of sources."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = release["VERSION_CODENAME"].strip('"')
    layout = "$(CREATED_BY) $(CODENAME) $(COMPONENT) $(REPO_URI)"
    listed = _run(["apt-get", "indextargets", "--format", layout]).splitlines()
    for kind, name, component, uri in (line.split(" ", 3) for line in listed):
        if (kind, name, component) == ("Packages", codename, "main"):
            return Source(uri, codename)
    raise AssertionError(f"apt of this machine has no source for {codename} main")


def make_base(folder: Path) -> Path:
    """Make ``folder/base``, or return it where it is already there. Needs root, mmdebstrap and apt's mirror.

    Raises ``AssertionError`` where Debian's Python is another minor version than the tests': the mounted packages
    hold compiled code and would not load.
    """
    base = folder / "base"
    if base.is_dir():
        return base
    source = machine_source()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "base.part"
    shutil.rmtree(part, ignore_errors=True)
    command = ["mmdebstrap", "--quiet", "--variant=extract", "--format=dir", f"--include={','.join(PACKAGES)}"]
    _run([*command, source.codename, str(part), f"deb {source.uri} {source.codename} main"])
    # Packages are unpacked but not configured, so the accounts are still only a template.
    for name in ("passwd", "group"):
        shutil.copyfile(part / "usr/share/base-passwd" / f"{name}.master", part / "etc" / name)
    (part / PACKAGES_IN_IMAGE.lstrip("/")).mkdir(parents=True, exist_ok=True)
    assert (part / "usr/bin" / PYTHON).exists(), f"the tests run {PYTHON}; the stand-in base of this machine has not"
    part.rename(base)
    return base


def make_image(base: Path, sqsh: Path) -> Path:
    """Pack a root file system into a squashfs file, as ``enroot import`` leaves it."""
    part = sqsh.with_name(sqsh.name + ".part")
    _run(["mksquashfs", str(base), str(part), *MKSQUASHFS])
    part.rename(sqsh)
    return sqsh


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
