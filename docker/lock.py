"""Write the hash-locked requirements of the container image: python3 docker/lock.py [--check]

requirements.lock   what the package needs at run time; torch and what belongs to it come with the base image
cuda.lock           what the compiled extensions import at run time
build.lock          the tools that compile the extensions; they stay in the first stage

Needs `uv` on PATH and an index that serves hashes. The locks hold for Python 3.11 and newer on any platform; no
index is named in them. With --check nothing is written, and the exit code is 1 where a lock names a version that
pyproject.toml or a *.in file no longer allows.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PYTHON = "3.11"
FROM_THE_BASE = ("torch", "torchvision", "torchaudio", "triton")
"""Packages that no lock may hold: the base image brings its own build of each."""

LOCKS = {
    "requirements.lock": ["--extra", "train", "--extra", "cuda", str(FOLDER.parent / "pyproject.toml")],
    "cuda.lock": ["--constraints", str(FOLDER / "requirements.lock"), str(FOLDER / "cuda.in")],
    "build.lock": [str(FOLDER / "build.in")],
}
HEADER = "# Written by docker/lock.py; change pyproject.toml or docker/*.in and run it again.\n"


def resolve(arguments: list[str], previous: Path) -> str:
    """The text of one lock. Versions in ``previous`` are kept where they still fit."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in FROM_THE_BASE))
        output = Path(folder) / "out.lock"
        if previous.exists():
            output.write_text(previous.read_text())
        command = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
        ]
        command += ["--python-version", PYTHON, "--overrides", str(overrides), "-o", str(output), *arguments]
        subprocess.run(command, check=True)
        return output.read_text()


def without_the_base(text: str) -> str:
    """Drop what only torch asked for: those entries carry the marker that is never true."""
    entries = re.split(r"\n(?=\S)", text.strip())
    return HEADER + "\n".join(entry for entry in entries if "sys_platform == 'never'" not in entry) + "\n"


def main(arguments: list[str]) -> int:
    stale = 0
    for name, sources in LOCKS.items():
        path = FOLDER / name
        text = without_the_base(resolve(sources, path))
        if "--check" in arguments:
            if not path.exists() or path.read_text() != text:
                print(f"{path}: not what docker/lock.py writes", file=sys.stderr)
                stale = 1
        else:
            path.write_text(text)
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
