"""Hold the base image's torch in place: torch_pin.py write FILE | torch_pin.py verify FILE

`write` records the versions of torch and its companions as pip constraints. An image then sets PIP_CONSTRAINT to the
file, so that no later `pip install` replaces the build that the compiled extensions are linked to: it ends with an
error instead. `verify` fails where the torch that Python now finds is another one, or lies in the virtual environment
that this Python belongs to: then something brought its own.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

HELD = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton")


def installed() -> dict[str, str]:
    found = {}
    for name in HELD:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def constraints() -> str:
    lines = ["# The base image's own builds. pip must not replace them: compiled extensions are linked to them.\n"]
    return "".join(lines + [f"{name}=={number}\n" for name, number in installed().items()])


def main(command: str, path: Path) -> str | None:
    """What is wrong, or None."""
    if "torch" not in installed():
        return "the base image has no torch; name an image with one in BASE"
    if command == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(constraints())
        return None
    if (now := constraints()) != path.read_text():
        return f"torch is not the base's any more: {path} held\n{path.read_text()}and now there is\n{now}"
    where = Path(str(distribution("torch").locate_file(""))).resolve()
    if sys.prefix != sys.base_prefix and where.is_relative_to(Path(sys.prefix).resolve()):
        return f"torch lies in {where}: a package brought its own"
    return None


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "verify"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
