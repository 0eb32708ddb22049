"""The project's Dockerfile built with buildah on the stand-in base, and commands in the image that comes out."""

from __future__ import annotations

import configparser
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.images import PACKAGES_IN_IMAGE, mount_of_packages, tests_packages

ROOT = Path(__file__).resolve().parents[2]
BASE, IMAGE = "localhost/stand-in:1", "localhost/moe-recipes:1"
CERTIFICATES = "/etc/ssl/certs"
NETWORK_KEYS = ("cert", "index-url", "extra-index-url", "trusted-host", "proxy", "timeout")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TORCH = "--volume", f"{tests_packages()}:{PACKAGES_IN_IMAGE}:ro"
"""The tests' packages where a base image has its own: torch is there while the image is built and when it runs."""

assert mount_of_packages() == TORCH[1]


class Buildah:
    """buildah with storage of its own in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        # overlay does not lie on overlay, which is what a container's own disk is.
        kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True).stdout.strip()
        driver = "vfs" if kind == "overlayfs" else "overlay"
        self._words = ["buildah", "--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", driver]

    def __call__(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self._words, *map(str, words)], capture_output=True, text=True, timeout=900)
        if check:
            assert done.returncode == 0, f"buildah {words[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done

    def make_base(self, rootfs: Path) -> str:
        """The stand-in base as an image."""
        container = self("from", "scratch").stdout.strip()
        self("add", "--quiet", container, rootfs, "/")
        self("config", "--env", PATH, container)
        self("commit", "--quiet", "--rm", container, BASE)
        return BASE

    def build(self, dockerfile: Path, tag: str, *options: str) -> None:
        # The machine's way to the package index is lent to the build and is in no layer of the image.
        settings = self.folder / "pip.conf"
        settings.write_text(machine_pip_settings())
        lent = ["--volume", f"{settings}:/etc/pip.conf:ro", "--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        network = ["--isolation", "chroot", "--network", "host"]
        self("bud", *network, *lent, *TORCH, *options, "--tag", tag, "--file", dockerfile, ROOT)

    @contextmanager
    def container(self, image: str) -> Iterator[Container]:
        name = self("from", "--pull-never", image).stdout.strip()
        try:
            yield Container(self, name)
        finally:
            self("rm", name)

    def unmount(self) -> None:
        """Leave nothing mounted in the folder, so that it can be deleted."""
        self("umount", "--all", check=False)
        storage = self.folder / "root" / "overlay"
        if storage.is_mount():
            subprocess.run(["umount", storage], check=True)


class Container:
    """A container to run commands in; what they write stays in it."""

    def __init__(self, buildah: Buildah, name: str) -> None:
        self._buildah, self.name = buildah, name

    def root(self) -> Path:
        """Its root file system, mounted."""
        return Path(self._buildah("mount", self.name).stdout.strip())

    def run(self, *words: str, options: Sequence[str] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command as the image's user, with torch where the base has it."""
        return self._buildah("run", "--isolation", "chroot", *TORCH, *options, self.name, "--", *words, check=check)


def machine_pip_settings() -> str:
    """How pip of this machine reaches an index, as a pip.conf; folders of the machine are left out."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = configparser.ConfigParser(interpolation=None)
    settings["global"] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        words = [word for word in value.strip("'\"").split() if not word.startswith("file:")]
        if key in NETWORK_KEYS and words:
            settings["global"][key] = " ".join(words)
    text = "".join(f"{key} = {value}\n" for key, value in settings["global"].items())
    return f"[global]\n{text}"
