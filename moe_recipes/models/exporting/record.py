"""EXPORT.json, the certificate of an exported folder: what it holds, how it was checked, and by whom."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_recipes.models.exporting.plan import ExportPlan, PlannedFile
from moe_recipes.runtime.crc32 import combine
from moe_recipes.runtime.files import write_durably
from moe_recipes.runtime.safetensors_file import DTYPE_NAMES

RECORD_NAME = "EXPORT.json"
FORMAT = 2
NOT_CHECKED = "not checked"


def cast_counts(plan: ExportPlan, model_dtypes: Mapping[str, Any]) -> dict[str, int]:
    """``float32 -> bfloat16``: number of tensors that have another dtype on disk than in the model."""
    pairs = ((model_dtypes[tensor.name], dtype) for tensor in plan.tensors for dtype, _ in tensor.disk.values())
    names = (f"{live} -> {disk}".replace("torch.", "") for live, disk in pairs if live != disk)
    return dict(sorted(Counter(names).items()))


def small_file_record(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def weight_file_record(file: PlannedFile, checksums: Mapping[str, int]) -> dict[str, Any]:
    """Size and CRC-32 of a whole file, from its header and its tensors' checksums: nothing is read."""
    layout = file.layout()
    in_order = sorted(layout.places.items(), key=lambda item: item[1].offset)
    parts = [(place.num_bytes, checksums[key]) for key, place in in_order if place.num_bytes]
    crc = combine([(len(layout.header), zlib.crc32(layout.header)), *parts])
    return {"bytes": layout.total_bytes, "crc32": f"{crc:08x}"}


def package_versions(names: Iterable[str] = ("moe-recipes", "safetensors", "torch", "transformers")) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def make_record(
    plan: ExportPlan,
    folder: Path,
    *,
    checksums: Mapping[str, int],
    small_files: Iterable[str],
    facts: Mapping[str, Any],
) -> bytes:
    """The bytes of EXPORT.json; ``tensors`` has one line a tensor: dtype, shape, CRC-32 of its bytes on disk."""
    files = {file.name: weight_file_record(file, checksums) for file in plan.files}
    files |= {name: small_file_record(folder / name) for name in small_files}
    record = {
        "format": FORMAT,
        "keys": len(plan.weight_map),
        "bytes": plan.total_bytes,
        **facts,
        "gathered": [tensor.name for tensor in plan.tensors if tensor.how == "gather"],
        "packages": package_versions(),
        "files": dict(sorted(files.items())),
    }
    rows = {
        key: [DTYPE_NAMES[dtype], list(shape), f"{checksums[key]:08x}"]
        for file in plan.files
        for key, (dtype, shape) in file.tensors.items()
    }
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    head = json.dumps(record, indent=2).removesuffix("\n}")
    return f'{head},\n  "tensors": {{\n{lines}\n  }}\n}}\n'.encode()


def write_failure(folder: Path, line: str) -> None:
    """Leave in a folder that failed its certificate why it did."""
    write_durably(folder / RECORD_NAME, (json.dumps({"format": FORMAT, "failed": line}, indent=2) + "\n").encode())
