"""The small files of an exported folder: config, tokenizer, index, record; and how the folder takes its place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from moe_recipes.config.errors import CannotWriteError, MissingInputError, RecipeError
from moe_recipes.models.exporting.plan import INDEX_NAME, ExportPlan
from moe_recipes.models.exporting.record import RECORD_NAME, write_failure
from moe_recipes.runtime.files import sync_folder, write_durably

QUANTIZATION_KEY = "quantization_config"
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
SOURCE_PATTERNS = ("generation_config.json", "*.py", "LICENSE*", "NOTICE*")
"""``*.py`` because the config, copied as it is, may name them in ``auto_map``."""


def without_top_key(text: str, key: str) -> str:
    """JSON object text with one top-level key cut out; every other character stays. Unchanged if it is not there.

    Raises:
        RecipeError: the text is not a JSON object.
    """
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        while text[at] in " \t\r\n":
            at += 1
        return at

    try:
        whole = json.loads(text)
        if not isinstance(whole, dict):
            raise TypeError(f"it is a {type(whole).__name__}")
        if key not in whole:
            return text
        at = skip(0) + 1
        while True:
            start = skip(at)
            name, at = decoder.raw_decode(text, start)
            _, end = decoder.raw_decode(text, skip(skip(at) + 1))
            comma = skip(end)
            if name == key:
                break
            at = comma + 1
    except (ValueError, TypeError) as error:
        raise RecipeError(f"config.json is not a JSON object: {error}") from error
    if text[comma] == ",":
        return text[:start] + text[skip(comma + 1) :]
    before = text[:start].rstrip()
    return before.removesuffix(",") + text[end:]


def exported_config(config_json: bytes) -> tuple[bytes, list[str]]:
    """The bytes of config.json and the edits made: the weights are written dequantised, so their format is dropped."""
    text = config_json.decode()
    edited = without_top_key(text, QUANTIZATION_KEY)
    return (config_json, []) if edited == text else (edited.encode(), [f"{QUANTIZATION_KEY} removed"])


def copy_companions(source_dir: Path | None, tokenizer_dir: Path | None, out_dir: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and code files as they are; returns their names.

    The tokenizer is that of ``tokenizer_dir``, or of ``source_dir`` if there is none: two are never mixed.

    Raises:
        MissingInputError: a folder is not there.
    """
    chosen: dict[str, Path] = {}
    for folder, patterns in ((source_dir, SOURCE_PATTERNS), (tokenizer_dir or source_dir, TOKENIZER_PATTERNS)):
        if folder is None:
            continue
        if not folder.is_dir():
            raise MissingInputError(f"export: {folder} is not a folder; give the folder that the model was loaded from")
        for pattern in patterns:
            found = [path for path in folder.glob(pattern) if path.is_file()]
            chosen.update((path.relative_to(folder).as_posix(), path) for path in found)
    for name, path in sorted(chosen.items()):
        (out_dir / name).parent.mkdir(exist_ok=True)
        write_durably(out_dir / name, path.read_bytes())
        sync_folder((out_dir / name).parent)
    return sorted(chosen)


def write_index(plan: ExportPlan, out_dir: Path) -> None:
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": plan.weight_map}
    write_durably(out_dir / INDEX_NAME, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def finish_replacement(out_dir: Path) -> None:
    """Give the earlier export its name back if a replacement died between its two renames."""
    old = old_folder(out_dir)
    if old.exists() and not out_dir.exists():
        os.rename(old, out_dir)


def check_replaceable(out_dir: Path, need_bytes: int) -> None:
    """Refuse a target that is not an earlier export, or a file system that is too small.

    Raises:
        CannotWriteError: see above.
    """
    if out_dir.exists() and not (out_dir / RECORD_NAME).is_file() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir} is there and holds no {RECORD_NAME}; choose a new folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out_dir.parent).free
    if free_bytes < need_bytes:
        raise CannotWriteError(
            f"{out_dir.parent} has {free_bytes / 2**30:.3f} GiB free, the export needs {need_bytes / 2**30:.3f} GiB;"
            " free space or choose another folder"
        )


def old_folder(out_dir: Path) -> Path:
    return out_dir.with_name(out_dir.name + ".old")


def failed_folder(out_dir: Path) -> Path:
    return out_dir.with_name(out_dir.name + ".failed")


def set_aside(new_dir: Path, out_dir: Path, line: str) -> Path:
    """Move a folder that failed its certificate where nobody takes it for an export; returns its new name."""
    failed = failed_folder(out_dir)
    write_failure(new_dir, line)
    shutil.rmtree(failed, ignore_errors=True)
    os.rename(new_dir, failed)
    sync_folder(out_dir.parent)
    return failed


def replace_folder(new_dir: Path, out_dir: Path) -> None:
    """Put a complete folder in place of an earlier one, which is removed last."""
    old = old_folder(out_dir)
    sync_folder(new_dir)
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        os.rename(out_dir, old)
    try:
        os.rename(new_dir, out_dir)
    except OSError:
        finish_replacement(out_dir)
        raise
    sync_folder(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)
