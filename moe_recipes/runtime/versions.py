"""The versions that this release was tested with, checked at the start of every run."""

from __future__ import annotations

import logging
import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from moe_recipes.config.errors import EnvironmentMismatchError

logger = logging.getLogger("moe_recipes")

SUPPORTED = {
    "python": ("3.11", "3.14"),
    "torch": ("2.11", "2.15"),
    "transformers": ("5.24", "5.25"),
}
"""First supported and first unsupported version. Transformers is narrow: the seams used here are young and move."""


def check_versions() -> None:
    """Refuse what cannot work, and warn of what was not tried.

    Raises:
        EnvironmentMismatchError: a package is missing or older than supported, or Transformers is newer.
    """
    for package, (first, beyond) in SUPPORTED.items():
        try:
            found = Version(platform.python_version() if package == "python" else version(package))
        except PackageNotFoundError as error:
            raise EnvironmentMismatchError(f"{package} is not installed; needed: >={first},<{beyond}") from error
        newer = found >= Version(beyond)
        if found < Version(first) or (newer and package == "transformers"):
            raise EnvironmentMismatchError(
                f"{package} {found} is outside the supported range >={first},<{beyond}; install a version in it"
            )
        if newer:
            logger.warning("%s %s is newer than what was tested (<%s)", package, found, beyond)
