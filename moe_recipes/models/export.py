"""Write a sharded model as a standard Hugging Face folder, every rank its own part, without gathering the model.

Keys, shapes, dtypes and values are those of ``save_pretrained`` in one process; ``export_plan`` says how they are
found. Dense files are created at full size by rank 0 and every rank writes its rows in place. A rank's experts go to
files that no other rank touches. On the host a rank holds one tensor's local part and its converted copy at a time.

    out_dir.tmp/  created, written, read back, recorded   ->  renamed to out_dir when all ranks agree
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from moe_recipes.config.errors import CannotWriteError, InfrastructureError, MoeRecipesError
from moe_recipes.models.export_convert import Converter, converted_experts, gather_objects, gathered
from moe_recipes.models.export_folder import (
    RECORD_NAME,
    check_replaceable,
    copy_companions,
    exported_config,
    file_record,
    package_versions,
    replace_folder,
    source_keys,
    write_index,
)
from moe_recipes.models.export_plan import ExportPlan, plan_export
from moe_recipes.models.export_verify import check_folder
from moe_recipes.runtime.files import write_durably
from moe_recipes.runtime.safetensors_file import create_file, write_rows
from moe_recipes.runtime.sharding import local_rows, local_tensor

logger = logging.getLogger(__name__)
T = TypeVar("T")
NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote. The same on every rank."""

    out_dir: Path
    num_keys: int
    total_bytes: int
    """Bytes of all tensors, headers not counted."""

    num_files: int
    """Weight files."""

    gathered: tuple[str, ...]
    """Model tensors whose conversion mixes rows, so that each was gathered, one at a time."""

    config_edits: tuple[str, ...]
    copied: tuple[str, ...]
    """Files copied from the source and tokenizer folders."""

    source_keys_left_out: tuple[str, ...]
    """Tensors of the source folder that the model does not hold, such as multi-token-prediction layers."""


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    """Steps that succeed on all ranks or fail on all."""

    out_dir: Path
    rank: int
    num_ranks: int
    barrier: Callable[[], None]
    agree: Callable[[bool], bool]

    @property
    def work_dir(self) -> Path:
        return self.out_dir.with_name(self.out_dir.name + ".tmp")

    def together(self, step: Callable[[], T], *, only_rank_0: bool = False) -> T | None:
        """Run ``step``; if it failed anywhere, remove the unfinished folder and raise on every rank."""
        result, error = None, None
        try:
            if self.rank == 0 or not only_rank_0:
                result = step()
        except Exception as caught:  # kept until all ranks know, so that none waits for this one
            error = caught
        if self.agree(error is None):
            return result
        failures = gather_objects(None if error is None else self._as_user_error(error), self.num_ranks)
        if self.rank == 0:
            shutil.rmtree(self.work_dir, ignore_errors=True)
        self.barrier()
        if error is not None and not isinstance(error, (OSError, MoeRecipesError)):
            raise error
        raise next(failure for failure in failures if failure is not None)

    def _as_user_error(self, error: Exception) -> MoeRecipesError:
        """What the ranks without the error raise too, so that all end with the same exit code."""
        if isinstance(error, MoeRecipesError):
            return error
        where = f"export to {self.out_dir}: rank {self.rank}"
        if isinstance(error, OSError):
            text = error.strerror or str(error)
            file = f": {error.filename}" if error.filename else ""
            return CannotWriteError(
                f"{where}: {text}{file}; the unfinished folder was removed: mend this, export again"
            )
        return InfrastructureError(f"{where} failed with {type(error).__name__}: {error}; its log has the traceback")


def export_model(
    model: PreTrainedModel,
    out_dir: Path,
    *,
    source_dir: Path | None,
    config_json: bytes,
    tokenizer_dir: Path | None,
    rank: int,
    num_ranks: int,
    barrier: Callable[[], None],
    agree: Callable[[bool], bool],
    max_file_bytes: int = 5 * 10**9,
    verify: bool = True,
) -> ExportReport:
    """Write the model to ``out_dir``. Every rank calls it, with an initialised default group if there are several.

    Args:
        model: DTensors sharded on dimension 0, or plain tensors; any device. It is not changed.
        source_dir: folder that the model was loaded from: generation config, code files, and the tokenizer unless
            ``tokenizer_dir`` has one. None: nothing is copied.
        config_json: written as it is; only ``quantization_config`` is cut out, as the weights are dequantised.
        agree: all-reduce AND over all ranks.
        max_file_bytes: of tensors in one file; a larger tensor is alone in its file.
        verify: read everything back before the rename (costs one read of the folder, shared by all ranks).
    Raises:
        CannotWriteError: an OSError on any rank, not enough space, an ``out_dir`` that is no earlier export, or bytes
            that do not read back. The unfinished folder is gone and an earlier export is untouched.
        RecipeError: the model is quantised, its conversion needs several tensors at once, or the config is not JSON.
        MissingInputError: a given folder is not there.
    """
    ranks = _Ranks(out_dir=out_dir, rank=rank, num_ranks=num_ranks, barrier=barrier, agree=agree)
    work_dir = ranks.work_dir
    plan, state, convert = plan_export(model, rank=rank, num_ranks=num_ranks, max_file_bytes=max_file_bytes)
    ranks.together(lambda: _prepare(work_dir, out_dir, plan), only_rank_0=True)
    ranks.together(lambda: _create_files(plan, work_dir, rank))
    _write_gathered(ranks, plan, state, convert)
    ranks.together(lambda: _write_own(plan, state, convert, work_dir, rank))
    small = ranks.together(
        lambda: _write_small(plan, work_dir, source_dir, tokenizer_dir, config_json), only_rank_0=True
    )
    small = gather_objects(small, num_ranks)[0]
    if verify:
        problems = check_folder(work_dir, plan.tensors, state, convert, rank=rank, num_ranks=num_ranks)
        ranks.together(lambda: _refuse(problems, out_dir))
    names = [file.name for file in plan.files] + ["config.json", *small["copied"]]
    mine = ranks.together(lambda: {name: file_record(work_dir / name) for name in names[rank::num_ranks]})
    records = {name: record for part in gather_objects(mine, num_ranks) for name, record in part.items()}
    ranks.together(lambda: _finish(plan, work_dir, out_dir, source_dir, small, records), only_rank_0=True)
    return ExportReport(
        out_dir=out_dir,
        num_keys=len(plan.weight_map),
        total_bytes=plan.total_bytes,
        num_files=len(plan.files),
        gathered=tuple(tensor.name for tensor in plan.tensors if tensor.how == "gather"),
        config_edits=tuple(small["config_edits"]),
        copied=tuple(small["copied"]),
        source_keys_left_out=tuple(small["source_keys_left_out"]),
    )


def _prepare(work_dir: Path, out_dir: Path, plan: ExportPlan) -> None:
    if work_dir.exists():
        shutil.rmtree(work_dir)  # left by an export that was killed
    check_replaceable(out_dir, plan.total_bytes)
    work_dir.mkdir()


def _create_files(plan: ExportPlan, work_dir: Path, rank: int) -> None:
    for file in plan.files:
        if file.creator == rank:
            create_file(work_dir / file.name, file.layout())


@contextlib.contextmanager
def _writer(plan: ExportPlan, work_dir: Path) -> Iterator[Callable[[str, int, torch.Tensor], None]]:
    """``write(key, first_row, rows)``; files are opened when first written and brought to disk at the end."""
    file_of = {key: file for file in plan.files for key in file.tensors}
    opened: dict[str, tuple[int, Any]] = {}

    def write(key: str, first_row: int, tensor: torch.Tensor) -> None:
        file = file_of[key]
        if file.name not in opened:
            opened[file.name] = os.open(work_dir / file.name, os.O_WRONLY), file.layout()
        descriptor, layout = opened[file.name]
        write_rows(descriptor, layout, key, first_row, tensor)

    try:
        yield write
        for descriptor, _ in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor, _ in opened.values():
            os.close(descriptor)


def _write_own(plan: ExportPlan, state: dict[str, torch.Tensor], convert: Converter, work_dir: Path, rank: int) -> None:
    """Write the rows and the whole experts that this rank is the first to hold."""
    with _writer(plan, work_dir) as write:
        for planned in plan.tensors:
            if planned.how == "gather":
                continue
            rows = local_rows(state[planned.name], rank=rank)
            if not rows.primary or not rows.count:
                continue
            local = local_tensor(state[planned.name]).detach()
            if planned.how == "rows":
                write(next(iter(planned.disk)), rows.start, local)
                continue
            for key, tensor in converted_experts(planned.name, local, rows.start, convert, planned.templates):
                write(key, 0, tensor)


def _write_gathered(ranks: _Ranks, plan: ExportPlan, state: dict[str, torch.Tensor], convert: Converter) -> None:
    for planned in plan.tensors:
        if planned.how != "gather":
            continue
        # The collective stays outside of what can fail on rank 0 alone, so that no rank waits for ever.
        converted = gathered(planned.name, state[planned.name], convert, rank=ranks.rank)

        def write_converted(converted: dict[str, torch.Tensor] = converted) -> None:
            with _writer(plan, ranks.work_dir) as write:
                for key, tensor in converted.items():
                    write(key, 0, tensor)

        ranks.together(write_converted, only_rank_0=True)


def _write_small(
    plan: ExportPlan, work_dir: Path, source_dir: Path | None, tokenizer_dir: Path | None, config_json: bytes
) -> dict[str, list[str]]:
    write_index(plan, work_dir)
    config, edits = exported_config(config_json)
    write_durably(work_dir / "config.json", config)
    copied = copy_companions(source_dir, tokenizer_dir, work_dir)
    left_out = sorted(source_keys(source_dir) - plan.weight_map.keys()) if source_dir else []
    if left_out:
        logger.warning(
            "export: %d tensors of %s are not in the model and not written: %s%s",
            len(left_out), source_dir, ", ".join(left_out[:NAMES_SHOWN]), " ..." * (len(left_out) > NAMES_SHOWN),
        )  # fmt: skip
    return {"config_edits": edits, "copied": copied, "source_keys_left_out": left_out}


def _refuse(problems: list[str], out_dir: Path) -> None:
    if problems:
        raise CannotWriteError(f"export to {out_dir} does not read back: {problems[0]} ({len(problems)} problems)")


def _finish(
    plan: ExportPlan,
    work_dir: Path,
    out_dir: Path,
    source_dir: Path | None,
    small: dict[str, Any],
    records: dict[str, Any],
) -> None:
    record = {
        "format": 1,
        "source": str(source_dir) if source_dir else None,
        "keys": len(plan.weight_map),
        "bytes": plan.total_bytes,
        **small,
        "gathered": [tensor.name for tensor in plan.tensors if tensor.how == "gather"],
        "packages": package_versions(),
        "files": dict(sorted(records.items())),
    }
    write_durably(work_dir / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
    replace_folder(work_dir, out_dir)
