"""Write a sharded model as a standard Hugging Face folder, every rank its own part, without gathering the model.

Keys, shapes, dtypes and values are those of ``save_pretrained`` in one process; ``plan.py`` says how they are
found. Dense files are created at full size by rank 0 and every rank writes its rows in place. A rank's experts go to
files that no other rank touches. On the host a rank holds one tensor's local part and its converted copy at a time.

    out_dir.tmp/     created, written, read back, certified   ->  renamed to out_dir when all ranks agree
    out_dir.failed/  what did not pass its certificate

A model that was loaded from a folder is written with that folder's keys, shapes and dtypes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_recipes.config.errors import CannotWriteError, NotFiniteError
from moe_recipes.models.exporting.checksums import Parts, merge_parts
from moe_recipes.models.exporting.convert import (
    Converter,
    converted_experts,
    gather_objects,
    gathered,
    written_pieces,
)
from moe_recipes.models.exporting.folder import (
    check_replaceable,
    copy_companions,
    exported_config,
    failed_folder,
    finish_replacement,
    replace_folder,
    set_aside,
    write_index,
)
from moe_recipes.models.exporting.plan import INDEX_NAME, ExportPlan, plan_export
from moe_recipes.models.exporting.ranks import ExportRanks
from moe_recipes.models.exporting.record import NOT_CHECKED, RECORD_NAME, cast_counts, make_record
from moe_recipes.models.exporting.source import SourceTensors, left_out_by_design, read_source_tensors
from moe_recipes.models.exporting.verify import Verified, check_folder
from moe_recipes.runtime.files import write_durably
from moe_recipes.runtime.safetensors_file import create_file, write_rows
from moe_recipes.runtime.sharding import local_rows, local_tensor

logger = logging.getLogger(__name__)
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
    """Tensors of the source folder that the model does not hold, such as layers that its family ignores."""

    cast: dict[str, int]
    """``float32 -> bfloat16``: number of tensors with another dtype on disk, the source's, than in the model."""

    quantised: dict[str, int]
    """``fp8`` or ``mxfp4`` -> tensors that are codes in the source and bfloat16 here."""

    num_experts: int
    """Routed experts found to be distinct; 0 where nothing was read back."""

    certificate: dict[str, Any]
    """What ``certify`` returned."""


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What the caller of ``export_model`` chose."""

    source_dir: Path | None
    config_json: bytes
    tokenizer_dir: Path | None
    max_file_bytes: int
    verify: bool
    like_source: bool
    certify: Callable[[Path], dict[str, Any]] | None


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
    like_source: bool = True,
    certify: Callable[[Path], dict[str, Any]] | None = None,
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
        like_source: keys, shapes and dtypes are those of ``source_dir``, if it has weights. False for weights that
            were drawn at random: dtypes are the model's.
        certify: called on rank 0 with the finished folder before it takes its place; what it returns goes into
            EXPORT.json. Where it raises NotFiniteError, the folder is kept as ``out_dir.failed``.
    Raises:
        CannotWriteError: an OSError on any rank, not enough space, an ``out_dir`` that is no earlier export, or bytes
            that do not read back. The unfinished folder is gone and an earlier export is untouched.
        NotFiniteError: equal experts or layers, or what ``certify`` raises. An earlier export is untouched.
        CorruptCheckpointError: the source has other keys or shapes than the model, or cannot be read.
        RecipeError: the model is quantised, its conversion needs several tensors at once, or the config is not JSON.
        MissingInputError: a given folder is not there.
    """
    ranks = ExportRanks(out_dir=out_dir, rank=rank, num_ranks=num_ranks, barrier=barrier, agree=agree)
    choices = _Choices(
        source_dir=source_dir, config_json=config_json, tokenizer_dir=tokenizer_dir, max_file_bytes=max_file_bytes,
        verify=verify, like_source=like_source, certify=certify,
    )  # fmt: skip
    return _export(model, ranks, choices)


def _export(model: PreTrainedModel, ranks: ExportRanks, choices: _Choices) -> ExportReport:
    rank, num_ranks, work_dir = ranks.rank, ranks.num_ranks, ranks.work_dir
    source = _read_source(ranks, choices.source_dir if choices.like_source else None)
    plan, state, convert = plan_export(
        model, rank=rank, num_ranks=num_ranks, max_file_bytes=choices.max_file_bytes, dtypes=source.dtypes
    )
    left_out = left_out_by_design(source, plan.tensors, model) if source.specs else []
    ranks.together(lambda: _prepare(work_dir, ranks.out_dir, plan), only_rank_0=True)
    ranks.together(lambda: _create_files(plan, work_dir, rank))
    written: Parts = defaultdict(list)
    _write_gathered(ranks, plan, state, convert, written)
    ranks.together(lambda: _write_own(plan, state, convert, work_dir, rank, written))
    checksums, lost = merge_parts(gather_objects(dict(written), num_ranks), plan.tensors)
    assert not lost, lost[0]
    small = gather_objects(ranks.together(lambda: _write_small(plan, work_dir, choices), only_rank_0=True), num_ranks)[
        0
    ]
    found = None
    if choices.verify:
        found = check_folder(work_dir, plan.tensors, state, convert, rank=rank, num_ranks=num_ranks)
        ranks.together(lambda: _accept(found, checksums, ranks), only_rank_0=True)
    certificate = ranks.together(lambda: _certify(choices.certify, ranks), only_rank_0=True)
    report = ExportReport(
        out_dir=ranks.out_dir,
        num_keys=len(plan.weight_map),
        total_bytes=plan.total_bytes,
        num_files=len(plan.files),
        gathered=tuple(tensor.name for tensor in plan.tensors if tensor.how == "gather"),
        config_edits=tuple(small["config_edits"]),
        copied=tuple(small["copied"]),
        source_keys_left_out=tuple(left_out),
        cast=cast_counts(plan, {name: tensor.dtype for name, tensor in state.items()}),
        quantised=source.quantised,
        num_experts=found.num_experts if found else 0,
        certificate=gather_objects(certificate, num_ranks)[0],
    )
    ranks.together(lambda: _finish(plan, ranks, report, checksums, choices), only_rank_0=True)
    return report


def _read_source(ranks: ExportRanks, source_dir: Path | None) -> SourceTensors:
    """The same on all ranks, of which one reads the headers."""

    def read() -> SourceTensors:
        finish_replacement(ranks.out_dir)
        return read_source_tensors(source_dir) if source_dir else SourceTensors(specs={}, quantised={})

    source: SourceTensors = gather_objects(ranks.together(read, only_rank_0=True), ranks.num_ranks)[0]
    return source


def _prepare(work_dir: Path, out_dir: Path, plan: ExportPlan) -> None:
    if work_dir.exists():
        shutil.rmtree(work_dir)  # left by an export that was killed
    shutil.rmtree(failed_folder(out_dir), ignore_errors=True)
    check_replaceable(out_dir, plan.total_bytes)
    work_dir.mkdir()


def _create_files(plan: ExportPlan, work_dir: Path, rank: int) -> None:
    for file in plan.files:
        if file.creator == rank:
            create_file(work_dir / file.name, file.layout())


@contextlib.contextmanager
def _writer(plan: ExportPlan, work_dir: Path, written: Parts) -> Iterator[Callable[[str, int, torch.Tensor], None]]:
    """``write(key, first_row, rows)``, in the dtype of the plan, with the checksum of what passes kept in ``written``.

    Files are opened when first written and brought to disk at the end.
    """
    file_of = {key: file for file in plan.files for key in file.tensors}
    opened: dict[str, tuple[int, Any]] = {}

    def write(key: str, first_row: int, tensor: torch.Tensor) -> None:
        file = file_of[key]
        if file.name not in opened:
            opened[file.name] = os.open(work_dir / file.name, os.O_WRONLY), file.layout()
        descriptor, layout = opened[file.name]
        for start, piece in written_pieces(key, tensor, layout.places[key].dtype):
            crc = write_rows(descriptor, layout, key, first_row + start, piece)
            written[key].append((first_row + start, piece.nbytes, crc))

    try:
        yield write
        for descriptor, _ in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor, _ in opened.values():
            os.close(descriptor)


def _write_own(
    plan: ExportPlan, state: dict[str, torch.Tensor], convert: Converter, work_dir: Path, rank: int, written: Parts
) -> None:
    """Write the rows and the whole experts that this rank is the first to hold."""
    with _writer(plan, work_dir, written) as write:
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


def _write_gathered(
    ranks: ExportRanks, plan: ExportPlan, state: dict[str, torch.Tensor], convert: Converter, written: Parts
) -> None:
    for planned in plan.tensors:
        if planned.how != "gather":
            continue
        # The collective stays outside of what can fail on rank 0 alone, so that no rank waits for ever.
        converted = gathered(planned.name, state[planned.name], convert, rank=ranks.rank)

        def write_converted(converted: dict[str, torch.Tensor] = converted) -> None:
            with _writer(plan, ranks.work_dir, written) as write:
                for key, tensor in converted.items():
                    write(key, 0, tensor)

        ranks.together(write_converted, only_rank_0=True)


def _write_small(plan: ExportPlan, work_dir: Path, choices: _Choices) -> dict[str, list[str]]:
    write_index(plan, work_dir)
    config, edits = exported_config(choices.config_json)
    write_durably(work_dir / "config.json", config)
    copied = copy_companions(choices.source_dir, choices.tokenizer_dir, work_dir)
    return {"config_edits": edits, "copied": copied}


def _accept(found: Verified, checksums: dict[str, int], ranks: ExportRanks) -> None:
    """Refuse bytes that are not those that were written, then weights that cannot be meant."""
    problems = found.problems or [
        f"{key}: its checksum on disk is not that of the weights" for key in checksums
        if found.checksums[key] != checksums[key]
    ]  # fmt: skip
    where = f"export to {ranks.out_dir}"
    if problems:
        raise CannotWriteError(f"{where} does not read back: {problems[0]} ({len(problems)} problems); export again")
    if found.equal:
        raise _failed(f"{found.equal[0]} ({len(found.equal)} such pairs)", ranks)


def _certify(certify: Callable[[Path], dict[str, Any]] | None, ranks: ExportRanks) -> dict[str, Any]:
    try:
        return certify(ranks.work_dir) if certify is not None else {}
    except NotFiniteError as error:
        raise _failed(str(error), ranks) from error


def _failed(reason: str, ranks: ExportRanks) -> NotFiniteError:
    kept = set_aside(ranks.work_dir, ranks.out_dir, reason)
    return NotFiniteError(f"export to {ranks.out_dir} failed its certificate: {reason}; it is kept as {kept}")


def _finish(
    plan: ExportPlan, ranks: ExportRanks, report: ExportReport, checksums: dict[str, int], choices: _Choices
) -> None:
    left_out = report.source_keys_left_out
    if left_out:
        names = ", ".join(left_out[:NAMES_SHOWN]) + " ..." * (len(left_out) > NAMES_SHOWN)
        logger.warning(
            "export: %d tensors of %s are not in the model and not written: %s",
            len(left_out),
            choices.source_dir,
            names,
        )
    facts = {
        "source": str(choices.source_dir) if choices.source_dir else None,
        "config_edits": report.config_edits,
        "copied": report.copied,
        "source_keys_left_out": left_out,
        "dequantised": report.quantised,
        "cast": report.cast,
        "read_back": choices.verify,
        "distinct_experts": report.num_experts if choices.verify else NOT_CHECKED,
        **report.certificate,
    }
    record = make_record(
        plan, ranks.work_dir, checksums=checksums, facts=facts, small_files=["config.json", INDEX_NAME, *report.copied]
    )
    write_durably(ranks.work_dir / RECORD_NAME, record)
    replace_folder(ranks.work_dir, ranks.out_dir)
