"""Load a distributed model from safetensors files: every rank reads its rows and its experts, straight into place.

    the model on meta, laid out     plan_loads            each rank                        one agreement
    parameters without bytes   ->   which key, which  ->  reads rows of its tensors,  ->   a problem of one rank is
                                    rows, which file      window by window                 the end of all, alike

Nothing is downloaded, and no rank reads for another.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, rename_source_key

from moe_recipes.config.errors import CorruptCheckpointError
from moe_recipes.models.exporting.convert import gather_objects
from moe_recipes.models.exporting.plan import saved_tensors
from moe_recipes.models.loading.files import open_weights
from moe_recipes.models.loading.plan import Load, LoadPlan, plan_loads, split_conversions
from moe_recipes.models.loading.stored import Quantization, Reader, Stored
from moe_recipes.models.mtp import mtp_of
from moe_recipes.runtime.sharding import Rows, local_rows, local_tensor
from moe_recipes.runtime.world import together

logger = logging.getLogger("moe_recipes")
PROGRESS_S = 10.0
KEYS_NAMED = 100
ATTRIBUTE = "moe_recipes_load"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load read. Equal on all ranks."""

    seconds: float
    """Of the slowest rank."""

    bytes_read_min: int
    bytes_read_max: int
    """Bytes of the files that the rank with least and with most read."""

    bytes_read_total: int
    gb_per_s: float
    """All ranks together, in 10^9 bytes a second."""

    files: int
    keys_left_out: tuple[str, ...]
    """Keys of the source that no rank reads, at most ``KEYS_NAMED``."""

    def line(self) -> str:
        least, most = (f"{count / 1e9:.3f}" for count in (self.bytes_read_min, self.bytes_read_max))
        text = f"weights: {most} GB a rank (least {least}) of {self.files} files in {self.seconds:.1f} s,"
        text += f" {self.gb_per_s:.2f} GB/s over all ranks"
        if self.keys_left_out:
            text += f"; {self.keys_left_out[0]} and others, not part of the model, are left out"
        return text


def report_of(model: PreTrainedModel) -> LoadReport | None:
    """The report of the model's load; None if it was not loaded here."""
    return getattr(model, ATTRIBUTE, None)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One run of rows of one stored tensor, and where in this rank's memory its values go."""

    stored: Stored
    start: int
    target: Tensor
    place: tuple[str, int]
    """File and offset: reads go in this order."""


@torch.no_grad()
def load_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    device: torch.device,
    quantization: Quantization | None = None,
) -> LoadReport:
    """Materialise a model on ``device`` and read its weights. Every rank of the layout calls it.

    Host memory that it needs beside the parameters themselves: less than twice ``stored.WINDOW_BYTES``; for a
    conversion that mixes rows (see ``docs/loading.md``) three times the largest such tensor.

    Args:
        model: on the meta device, already distributed (or in one process).
        quantization: of the files; the parameters get the values that the codes stand for.
    Raises:
        SeveralAtOnceError: the conversion does not go tensor by tensor; the model is of no use then.
        MissingInputError, CorruptCheckpointError, InfrastructureError: one line with file and tensor.
        OtherRankError: another rank met one of these; the message and the exit code are its own.
    """
    start = time.monotonic()
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    fill = partial(_fill, model, folder, device, quantization)
    plan, count = together(fill) if dist.is_initialized() else fill()
    _initialize_rest(model, plan)
    everywhere = gather_objects((count, time.monotonic() - start), num_ranks)
    counts, seconds = [count for count, _ in everywhere], max(seconds for _, seconds in everywhere)
    report = LoadReport(
        seconds=round(seconds, 3),
        bytes_read_min=min(counts),
        bytes_read_max=max(counts),
        bytes_read_total=sum(counts),
        gb_per_s=round(sum(counts) / 1e9 / max(seconds, 1e-9), 3),
        files=plan.num_files,
        keys_left_out=tuple(plan.left_out[:KEYS_NAMED]),
    )
    setattr(model, ATTRIBUTE, report)
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("%s", report.line())
    return report


def _fill(
    model: PreTrainedModel, folder: Path, device: torch.device, quantization: Quantization | None
) -> tuple[LoadPlan, int]:
    """This rank's part of a load, without a word to other ranks; returns the plan and the bytes read."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with open_weights(folder) as files:
        files.check_present()
        plan = plan_loads(model, files, quantization)
        plan.check(model, files)
        model.to_empty(device=device)
        model.tie_weights()
        reader = Reader(files, device, quantization)
        _load(model, plan, reader, rank=rank, num_ranks=num_ranks)
    return plan, reader.num_bytes


def _load(model: PreTrainedModel, plan: LoadPlan, reader: Reader, *, rank: int, num_ranks: int) -> None:
    """Check what this rank reads, and its share of all files; then read."""
    state = saved_tensors(model)
    reads, mixed, same = [], [], []
    for load in plan.loads:
        tensor = state[load.same_as or load.planned.name]
        rows = local_rows(tensor, rank=rank)
        if load.same_as is not None:
            same.append((load, rows, local_tensor(tensor).detach()))
        elif not load.is_mixed:
            reads += list(_reads_of(load, rows, local_tensor(tensor).detach(), reader))
            continue
        else:
            mixed.append((load, rows, local_tensor(tensor).detach()))
        for key, stored in load.stored.items():
            if stored is not None:
                reader.check(stored, load.planned.disk[key][1], tensor.dtype)
    # Each file is looked at by one rank, also those of which no rank reads a byte.
    reader.files.check_contents(reader.files.names[rank::num_ranks])
    progress = _Progress(reader, is_main=rank == 0)
    for read in sorted(reads, key=lambda read: read.place):
        reader.read(read.stored, read.start, read.target)
        progress.say()
    for load, rows, local in mixed:
        _read_mixed(model, plan, load, rows, local, reader)
        progress.say()
    for load, rows, local in same:
        _compare(model, load, rows, local, reader)


def _reads_of(load: Load, rows: Rows, local: Tensor, reader: Reader) -> Iterator[_Read]:
    if not rows.count:
        return
    shape_of = {stored: load.planned.disk[key][1] for key, stored in load.stored.items()}
    for stored, first, _, expert, number in load.of_rows(rows.start, rows.start + rows.count):
        reader.check(stored, shape_of[stored], local.dtype)
        target = local if expert is None else load.parts[number].of(local[expert - rows.start])
        name = reader.files.weight_map[stored.keys[0]]
        place = reader.files.place(stored.keys[0])
        yield _Read(stored=stored, start=first, target=target, place=(name, place.offset + first * place.row_bytes))


def _read_mixed(model: PreTrainedModel, plan: LoadPlan, load: Load, rows: Rows, local: Tensor, reader: Reader) -> None:
    """A tensor whose conversion mixes rows: all of it goes through Transformers' conversion, and the rows are kept."""
    renamings, converters = split_conversions(plan.conversions)
    converter, target = None, ""
    for key in sorted(load.stored, key=dot_natural_key):
        stored = load.stored[key]
        assert stored is not None, key
        values = torch.empty(load.planned.disk[key][1], dtype=local.dtype, device=reader.device)
        reader.read(stored, 0, values)
        target, pattern = rename_source_key(stored.key, renamings, converters)
        if converter is None:
            converter = copy.deepcopy(next(one for one in converters if pattern in one.source_patterns))
        converter.add_tensor(target, stored.key, pattern, values)
    assert converter is not None, load.planned.name
    made = converter.convert(target, model=model, config=model.config)
    whole = made.get(load.planned.name, next(iter(made.values())))
    whole = whole[0] if isinstance(whole, list) else whole
    if tuple(whole.shape) != load.planned.shape:
        raise CorruptCheckpointError(
            f"{reader.files.folder}: {load.planned.name} becomes {list(whole.shape)}, not {list(load.planned.shape)};"
            " fetch the model again, or the config.json that belongs to its weights"
        )
    local.copy_(whole[rows.start : rows.start + rows.count] if rows.shape else whole)


def _compare(model: PreTrainedModel, load: Load, rows: Rows, local: Tensor, reader: Reader) -> None:
    """What the files hold a second time is the same as the first, on the rows of this rank.

    Raises:
        CorruptCheckpointError: it is not.
    """
    stored = next(one for one in load.stored.values() if one is not None)
    for first, values in reader.windows(stored, rows.start, rows.start + rows.count, local):
        if not torch.equal(values, local[first - rows.start : first - rows.start + len(values)]):
            mtp = mtp_of(model)
            shared = mtp is not None and load.planned.name in mtp.copies
            why = "which multi-token prediction shares" if shared else "which config.json ties to it"
            raise CorruptCheckpointError(
                f"{reader.files.folder}: {load.planned.name} is not the same as {load.same_as}, {why}; fetch the model"
                " again, or the config.json that belongs to its weights"
            )


def _initialize_rest(model: PreTrainedModel, plan: LoadPlan) -> None:
    """Values that no file holds, such as the frequencies of rotary embeddings, as ``from_pretrained`` makes them."""
    loaded = {load.planned.name for load in plan.loads if None not in load.stored.values()}
    loaded |= (model.all_tied_weights_keys or {}).keys()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if name in loaded:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
    model.eval()


class _Progress:
    """A line on rank 0 now and then while a long load goes on."""

    def __init__(self, reader: Reader, *, is_main: bool) -> None:
        self.reader, self.is_main = reader, is_main
        self.start = self.last = time.monotonic()

    def say(self) -> None:
        now = time.monotonic()
        if self.is_main and now - self.last > PROGRESS_S:
            self.last = now
            logger.info("weights: %.2f GB read in %.0f s", self.reader.num_bytes / 1e9, now - self.start)
