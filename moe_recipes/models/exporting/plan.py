"""What every tensor of a model becomes in a Hugging Face folder, and which file holds it, before a byte is moved.

The names and shapes on disk come from Transformers' own reverse conversion, run on meta tensors of the global shapes:
no weight is read and no rank talks, except to learn which rank holds which experts. Every rank computes the same plan.

    in the model                          on disk                                     written by
    ------------------------------------  ------------------------------------------  -------------------------------
    rows     q_proj.weight [R, D]         one tensor, equal shape                     each rank: its rows, in place
    experts  experts.gate_up_proj [E,..]  experts.0.gate_proj ... experts.E-1.up_proj  each rank: its experts, own files
    gather   any other conversion         whatever the conversion makes               rank 0, after a gather of this one
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moe_recipes.config.errors import RecipeError
from moe_recipes.models.exporting.convert import Converter, Templates, gather_objects
from moe_recipes.models.mtp import mtp_of
from moe_recipes.runtime.safetensors_file import FileLayout, plan_header
from moe_recipes.runtime.sharding import Rows, local_rows

METADATA = {"format": "pt"}
INDEX_NAME = "model.safetensors.index.json"
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the model's state dict and the tensors that it becomes on disk."""

    name: str
    how: Literal["rows", "experts", "gather"]
    shape: tuple[int, ...]
    """Global shape in the model."""

    disk: dict[str, Spec]
    """Disk key -> dtype and global shape."""

    templates: Templates = ()
    """For ``experts``: what stands before and after the expert's number in each of an expert's keys."""

    def keys_of_expert(self, expert: int) -> list[str]:
        """Disk keys of one expert, by its number in the whole model."""
        return [f"{before}{expert}{after}" for before, after in self.templates]


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One safetensors file. ``creator`` is the rank that makes it; it is the only writer of an experts' file."""

    name: str
    creator: int
    tensors: dict[str, Spec]

    def layout(self) -> FileLayout:
        return plan_header(self.tensors, METADATA)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The whole folder. Equal on all ranks."""

    tensors: list[PlannedTensor]
    files: list[PlannedFile]

    @property
    def weight_map(self) -> dict[str, str]:
        return {key: file.name for file in self.files for key in file.tensors}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(spec_bytes(spec) for file in self.files for spec in file.tensors.values())


def spec_bytes(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that ``save_pretrained`` keeps, by state-dict name: local or DTensor, tied copies dropped.

    Raises:
        RecipeError: the model is quantised, or holds state that is no tensor.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise RecipeError("model: a quantised model cannot be exported; load it dequantised")
    state = model.state_dict()
    for ignored in model._keys_to_ignore_on_save or ():
        state.pop(ignored, None)
    other = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise RecipeError(f"model: {other[0]} is state that is not a tensor; safetensors cannot hold it")
    # Tied names are found by the identity of the parameter, as local parts without rows all have address 0.
    kept = remove_tied_weights_from_state_dict(_meta(state), model)
    tensors = {name: state[name] for name in kept}
    mtp = mtp_of(model)
    return tensors | {name: tensors[source] for name, source in (mtp.copies if mtp is not None else {}).items()}


def with_dtypes(tensors: list[PlannedTensor], dtypes: Mapping[str, torch.dtype]) -> list[PlannedTensor]:
    """The same plan with these dtypes on disk, by disk key; only between floating-point types that hold weights."""

    def chosen(key: str, spec: Spec) -> Spec:
        new = dtypes.get(key, spec[0])
        return (new if new in WEIGHT_DTYPES and spec[0] in WEIGHT_DTYPES else spec[0]), spec[1]

    return [replace(t, disk={key: chosen(key, spec) for key, spec in t.disk.items()}) for t in tensors]


def _meta(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(tuple(t.shape), dtype=t.dtype, device="meta") for name, t in tensors.items()}


def plan_tensors(state: Mapping[str, torch.Tensor], convert: Converter, model: PreTrainedModel) -> list[PlannedTensor]:
    """What each tensor becomes on disk, checked against the reverse conversion of all tensors at once.

    Raises:
        RecipeError: the family has a conversion that needs several tensors at once, or makes other keys.
    """
    meta = _meta(state)
    verdicts: dict[Any, bool] = {}
    planned = [_plan_tensor(name, tensor, convert, verdicts) for name, tensor in meta.items()]
    planned = [t if _is_sharded_by_rows(state[t.name]) else replace(t, how="gather") for t in planned]
    want = {key: _spec(tensor) for key, tensor in revert_weight_conversion(model, dict(meta)).items()}
    count = Counter(key for tensor in planned for key in tensor.disk)
    have = {key: spec for tensor in planned for key, spec in tensor.disk.items()}
    wrong = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key) or count[key] > 1)
    if wrong:
        raise RecipeError(
            f"model: {type(model).__name__} converts several tensors at once: {len(wrong)} keys differ tensor by"
            f" tensor, first {wrong[0]}; export it with save_pretrained in one process"
        )
    return planned


def _is_sharded_by_rows(tensor: torch.Tensor) -> bool:
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in placements)


def _spec(tensor: torch.Tensor) -> Spec:
    return tensor.dtype, tuple(tensor.shape)


def _plan_tensor(name: str, meta: torch.Tensor, convert: Converter, verdicts: dict[Any, bool]) -> PlannedTensor:
    disk = convert({name: meta})
    specs = {key: _spec(tensor) for key, tensor in disk.items()}
    shape = tuple(meta.shape)
    if len(disk) == 1 and next(iter(disk.values())) is meta:
        return PlannedTensor(name=name, how="rows", shape=shape, disk=specs)
    templates = _expert_templates(name, meta, convert)
    if templates:
        pattern = re.sub(r"\d+", "#", name), shape
        if pattern not in verdicts:
            verdicts[pattern] = _goes_expert_by_expert(name, meta, convert, templates)
        keys = {f"{before}{expert}{after}" for before, after in templates for expert in range(shape[0])}
        if verdicts[pattern] and keys == specs.keys():
            return PlannedTensor(name=name, how="experts", shape=shape, disk=specs, templates=templates)
    return PlannedTensor(name=name, how="gather", shape=shape, disk=specs)


def _expert_templates(name: str, meta: torch.Tensor, convert: Converter) -> Templates:
    """Where the expert's number stands in each key, from what one row and two rows convert to; empty if nowhere."""
    if meta.ndim < 2 or meta.shape[0] < 2:
        return ()
    try:
        one, two = convert({name: meta[:1]}), convert({name: meta[:2]})
    except (ValueError, RuntimeError, IndexError, AttributeError):
        return ()  # the conversion refuses a part of the rows, so the tensor is gathered
    templates = []
    for key in one:
        places = [match.span() for match in re.finditer(r"(?<=\.)0(?=\.)", key)]
        cut = [(key[:start], key[end:]) for start, end in places]
        cut = [(before, after) for before, after in cut if f"{before}1{after}" in two.keys() - one.keys()]
        if len(cut) != 1:
            return ()
        templates += cut
    return tuple(templates) if len(two) == 2 * len(one) else ()


def _goes_expert_by_expert(name: str, meta: torch.Tensor, convert: Converter, templates: Templates) -> bool:
    """Whether the conversion of some rows is those rows of the conversion, proved on numbered values.

    The probe keeps the number of experts and cuts the other dimensions to 4, so it costs a few KiB.
    """
    shape = meta.shape[0], *(min(4, size) for size in meta.shape[1:])
    probe = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).view(shape)
    half = shape[0] // 2
    try:
        whole, upper = convert({name: probe}), convert({name: probe[half:]})
    except (ValueError, RuntimeError, IndexError, AttributeError):
        return False
    row_size = probe[0].numel()
    for (before, after), expert in itertools.product(templates, range(shape[0])):
        part = whole.get(f"{before}{expert}{after}")
        if part is None or not bool((part // row_size == expert).all()):
            return False
        if expert >= half and not torch.equal(part, upper.get(f"{before}{expert - half}{after}", probe)):
            return False
    return len(whole) == shape[0] * len(templates)


def plan_files(
    tensors: list[PlannedTensor], owners: Mapping[str, list[tuple[int, Rows]]], *, max_file_bytes: int
) -> list[PlannedFile]:
    """Files of at most ``max_file_bytes`` of tensors (a larger tensor is alone in its file), numbered from 1.

    Files that several ranks write come first, then each rank's own experts.

    Args:
        owners: for each ``experts`` tensor, the primary holders as (rank, rows).
    """
    shared: dict[str, Spec] = {}
    own: dict[int, dict[str, Spec]] = {}
    for tensor in tensors:
        if tensor.how != "experts":
            shared.update(tensor.disk)
            continue
        for rank, rows in owners[tensor.name]:
            keys = own.setdefault(rank, {})
            for expert in range(rows.start, rows.start + rows.count):
                keys.update((key, tensor.disk[key]) for key in tensor.keys_of_expert(expert))
    bins = [(0, part) for part in _cut(shared, max_file_bytes)]
    bins += [(rank, part) for rank in sorted(own) for part in _cut(own[rank], max_file_bytes)]
    return [
        PlannedFile(name=f"model-{number:05d}-of-{len(bins):05d}.safetensors", creator=rank, tensors=part)
        for number, (rank, part) in enumerate(bins, start=1)
    ]


def _cut(tensors: Mapping[str, Spec], max_file_bytes: int) -> Iterator[dict[str, Spec]]:
    part: dict[str, Spec] = {}
    size = 0
    for key, spec in tensors.items():
        if part and size + spec_bytes(spec) > max_file_bytes:
            yield part
            part, size = {}, 0
        part[key] = spec
        size += spec_bytes(spec)
    if part:
        yield part


def plan_export(
    model: PreTrainedModel,
    *,
    rank: int,
    num_ranks: int,
    max_file_bytes: int,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> tuple[ExportPlan, dict[str, torch.Tensor], Converter]:
    """The plan, the saved tensors and the converter. Every rank calls it; one small exchange of expert ranges.

    Args:
        dtypes: by disk key, where others than the model's are to be written.
    Raises:
        RecipeError: see ``saved_tensors`` and ``plan_tensors``.
    """
    state = saved_tensors(model)
    convert = Converter(model)
    tensors = with_dtypes(plan_tensors(state, convert, model), dtypes or {})
    mine = {t.name: local_rows(state[t.name], rank=rank) for t in tensors if t.how == "experts"}
    owners: dict[str, list[tuple[int, Rows]]] = {name: [] for name in mine}
    for holder, held in enumerate(gather_objects(mine, num_ranks)):
        for name, rows in held.items():
            if rows.primary and rows.count:
                owners[name].append((holder, rows))
    for name, holders in owners.items():
        covered = sorted(expert for _, rows in holders for expert in range(rows.start, rows.start + rows.count))
        assert covered == list(range(mine[name].shape[0])), f"{name}: experts {covered} have a primary holder"
    files = plan_files(tensors, owners, max_file_bytes=max_file_bytes)
    return ExportPlan(tensors=tensors, files=files), state, convert
