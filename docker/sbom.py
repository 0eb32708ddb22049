"""Write what an image holds as a CycloneDX 1.6 file: sbom.py FILE --name PACKAGE --base REFERENCE

Python distributions come from their metadata, as `pip inspect` reads them: where two folders of the path hold one, the
first is listed, for it is the one that is imported. Debian packages come from dpkg's own database. Extensions compiled
from git carry their source and commit, from PREFIX/share/extensions.txt. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions, version
from pathlib import Path
from typing import Any

DPKG_STATUS = Path("/var/lib/dpkg/status")
EXTENSIONS = Path(sys.prefix) / "share" / "extensions.txt"
OS_RELEASE = Path("/etc/os-release")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sources() -> dict[str, str]:
    """Source of each compiled extension, by name."""
    if not EXTENSIONS.exists():
        return {}
    lines = (line.split() for line in EXTENSIONS.read_text().splitlines())
    return {name: source for name, _, source in lines}


def python_component(found: Distribution, source: str | None) -> dict[str, Any]:
    name = normalised(found.metadata["Name"])
    purl = f"pkg:pypi/{name}@{found.version.replace('+', '%2B')}"
    inside = Path(str(found.locate_file(""))).resolve().is_relative_to(Path(sys.prefix).resolve())
    added = inside and sys.prefix != sys.base_prefix
    properties = [{"name": "moe-recipes:from", "value": "this image" if added else "base image"}]
    if source:
        properties.append({"name": "moe-recipes:source", "value": source})
    component = {"type": "library", "bom-ref": purl, "name": name, "version": found.version, "purl": purl}
    licence = found.metadata.get("License-Expression")
    return component | ({"licenses": [{"expression": licence}]} if licence else {}) | {"properties": properties}


def python_components() -> Iterator[dict[str, Any]]:
    seen, source_of = set(), sources()
    for found in distributions():
        name = normalised(found.metadata["Name"] or "")
        if name and name not in seen:
            seen.add(name)
            yield python_component(found, source_of.get(name))


def debian_components() -> Iterator[dict[str, Any]]:
    system = re.search(r"^ID=\"?(\w+)", OS_RELEASE.read_text(), re.MULTILINE) if OS_RELEASE.exists() else None
    vendor = system[1] if system else "debian"
    for entry in DPKG_STATUS.read_text().split("\n\n") if DPKG_STATUS.exists() else ():
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
        if fields.get("Status") == "install ok installed":
            name, number, machine = fields["Package"], fields["Version"], fields["Architecture"]
            purl = f"pkg:deb/{vendor}/{name}@{number.replace('+', '%2B').replace(':', '%3A')}?arch={machine}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}


def sbom(options: argparse.Namespace) -> dict[str, Any]:
    debian = sorted(debian_components(), key=lambda part: part["bom-ref"])
    components = sorted(python_components(), key=lambda part: part["bom-ref"]) + debian
    properties = [{"name": "moe-recipes:base", "value": options.base}]
    properties.append({"name": "moe-recipes:dpkg", "value": "read" if debian else "no package database in the base"})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {"type": "container", "name": options.name, "version": version(options.name)},
            "properties": properties,
        },
        "components": components,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    for name in ("--name", "--base"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(json.dumps(sbom(options), indent=1) + "\n")


if __name__ == "__main__":
    main()
