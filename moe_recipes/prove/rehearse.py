"""The rehearsal: a recipe's true model on the meta device, for the ranks of its mesh, one after another in one process.

``python -m moe_recipes.prove.rehearse FOLDER --recipe-json JSON [--all]``. torch's fake process group stands for the
other ranks; layout, whole experts and optimizer are those of a training run. What it finds goes to
``FOLDER/rehearse.json``, and the slices of each rehearsed rank to ``FOLDER/reads/rank-RRRRR.jsonl``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from moe_recipes.config.errors import EXIT_OK, MoeRecipesError, NotFiniteError
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.resolve import recipe_from_dict
from moe_recipes.config.run_folder import write_json
from moe_recipes.models.build import build_model, quantization_of, read_source
from moe_recipes.models.float32_kept import kept_parameters
from moe_recipes.prove.ownership import Held, describe_placement, holders, ownership_problems
from moe_recipes.prove.rehearse_report import report_lines
from moe_recipes.prove.report import say_error
from moe_recipes.prove.slices import Reads, describe_known, known_weights
from moe_recipes.runtime.sharding import local_rows, local_tensor
from moe_recipes.train.optim import build_optimizer, prepare_state

SCHEMA_VERSION = 1


@dataclass(kw_only=True)
class RankBytes:
    """What one rehearsed rank holds and would read. Exact: padding of FSDP2's buffers and activations are not in it."""

    rank: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buffer_bytes: int
    read_bytes: int = 0
    read_slices: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Rehearsal:
    """All that was found. Parameters are those of the first rehearsed rank; every other one was held against it."""

    model: str
    num_ranks: int
    mesh: str
    num_parameters: int = 0
    parameters: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[RankBytes] = field(default_factory=list)
    source: str = ""
    source_keys_left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def fake_ranks(rank: int, num_ranks: int) -> Iterator[None]:
    """This process as one rank of many; collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()
        _forget_meshes()


def _forget_meshes() -> None:
    """torch keeps what DTensor operations return, mesh included, under a key that two ranks' meshes share."""
    for name, clear in vars(debug).items():
        if name.startswith("_clear_"):
            clear()


def sampled_ranks(recipe: Recipe) -> list[int]:
    """The first and last rank, and the neighbour of rank 0 along each axis of the mesh: (dp_replicate, efsdp, ep)."""
    parallel = recipe.parallel
    steps = {"ep": 1, "efsdp": parallel.ep_size, "dp_replicate": parallel.fsdp_size}
    sizes = {"ep": parallel.ep_size, "efsdp": parallel.efsdp_size, "dp_replicate": parallel.dp_replicate_size}
    neighbours = [steps[axis] for axis, size in sizes.items() if size > 1]
    return sorted({0, *neighbours, parallel.num_ranks - 1})


def rehearse(recipe: Recipe, ranks: list[int], folder: Path) -> Rehearsal:
    """Build the model as each of ``ranks``, and check who holds what.

    Raises:
        RecipeError, MissingInputError: as a training run at its start.
    """
    start = time.monotonic()
    source, parallel = read_source(recipe), recipe.parallel
    mesh = f"dp_replicate {parallel.dp_replicate_size} x efsdp {parallel.efsdp_size} x ep {parallel.ep_size}"
    found = Rehearsal(model=str(source.config.get("model_type")), num_ranks=parallel.num_ranks, mesh=mesh)
    reads, owners = None, _Owners(num_ranks=parallel.num_ranks, replicas=parallel.dp_replicate_size)
    shutil.rmtree(folder / "reads", ignore_errors=True)
    (folder / "reads").mkdir(parents=True)
    files, left = known_weights(source.folder), list(ranks)
    quantization = quantization_of(recipe, source.config)
    while left:
        rank, began = left.pop(0), time.monotonic()
        with fake_ranks(rank, parallel.num_ranks), tempfile.TemporaryDirectory() as scratch:
            model = build_model(recipe, source, scratch=Path(scratch), meta=True)
            if reads is None:
                found.model = type(model).__name__.removeprefix("FSDP")
                found.num_parameters = sum(parameter.numel() for parameter in model.parameters())
                copies = kept_parameters(model)
                found.parameters = [_described(name, one, copies) for name, one in model.named_parameters()]
                reads = Reads(model, files, num_ranks=parallel.num_ranks, quantization=quantization)
                found.source, found.source_keys_left_out = describe_known(files), reads.left_out()
                found.problems += reads.problems()
            owners.add(model, rank)
            record = _bytes_of(model, recipe, rank=rank)
            del model
        slices = [*reads.of_rank(rank)]
        record.read_bytes, record.read_slices = sum(piece.num_bytes for piece in slices), len(slices)
        lines = "".join(f"{json.dumps(piece.to_json())}\n" for piece in slices)
        (folder / "reads" / f"rank-{rank:05d}.jsonl").write_text(lines)
        record.seconds = round(time.monotonic() - began, 2)
        found.ranks.append(record)
        left = left or owners.ranks_to_add(known={one.rank for one in found.ranks})
    found.problems += owners.problems()
    found.seconds = round(time.monotonic() - start, 2)
    return found


class _Owners:
    """Who holds each parameter, put together from the meshes that the rehearsed ranks know."""

    def __init__(self, *, num_ranks: int, replicas: int) -> None:
        self.num_ranks, self.replicas = num_ranks, replicas
        self.rows: dict[str, int] = {}
        self.held: dict[str, dict[int, Held]] = {}
        """By parameter and rank: what each rank of a mesh holds."""

        self.copies: set[str] = set()
        """Parameters that the model declares to be whole on every rank."""

        self.contradictions: list[str] = []

    def add(self, model: PreTrainedModel, rank: int) -> None:
        """Take in the model of one rank, and hold what it has against what its mesh says that it has."""
        missing = self.rows.keys() - {name for name, _ in model.named_parameters()}
        self.contradictions += [f"{name}: rank {rank} has no such parameter" for name in sorted(missing)]
        self.copies |= kept_parameters(model).keys()
        for name, parameter in model.named_parameters():
            self.rows[name] = parameter.shape[0] if parameter.ndim else 1
            try:
                held = {one.rank: one for one in holders(parameter, num_ranks=self.num_ranks)}
                said = local_rows(parameter, rank=rank)
            except ValueError as error:
                self.contradictions.append(f"{name}: {error}")
                continue
            mine, shape = held.get(rank), tuple(local_tensor(parameter).shape)
            if mine is None or mine.count != said.count or (mine.count and mine.start != said.start):
                self.contradictions.append(f"{name}: rank {rank} says {said}, its mesh {mine}")
            if shape != said.local_shape:
                self.contradictions.append(f"{name}: rank {rank} holds {list(shape)}, not {list(said.local_shape)}")
            self.held.setdefault(name, {}).update(held)

    def ranks_to_add(self, *, known: set[int]) -> list[int]:
        """One rank of those that no mesh so far holds: its model must be built too."""
        everyone = set(range(self.num_ranks))
        unseen = {rank for held in self.held.values() for rank in everyone - held.keys()} - known
        return [min(unseen)] if unseen else []

    def problems(self) -> list[str]:
        """All that is wrong, by parameter."""
        found = list(self.contradictions)
        for name, held in self.held.items():
            replicas = self.num_ranks if name in self.copies else self.replicas
            problems = ownership_problems(self.rows[name], held.values(), replicas=replicas)
            found += [f"{name}: {problem}" for problem in problems]
        return found


def _bytes_of(model: PreTrainedModel, recipe: Recipe, *, rank: int) -> RankBytes:
    """Bytes of this rank's parts, and of the optimizer state that the trainer would make for them."""

    def of(tensors: Any) -> int:
        return sum(local_tensor(tensor).numel() * tensor.element_size() for tensor in tensors)

    optimizer = build_optimizer(model, recipe.optim)
    prepare_state(optimizer, step=1)
    state = [value for states in optimizer.state.values() for name, value in states.items() if name != "step"]
    return RankBytes(
        rank=rank,
        parameter_bytes=of(model.parameters()),
        # FSDP2 and the expert kernels hand a gradient over in its weight's dtype.
        gradient_bytes=of(parameter for parameter in model.parameters() if parameter.requires_grad),
        optimizer_bytes=of(state),
        buffer_bytes=of(model.buffers()),
    )


def _described(name: str, parameter: nn.Parameter, copies: Collection[str]) -> dict[str, Any]:
    num_ranks = dist.get_world_size()
    try:
        counts = [one.count for one in holders(parameter, num_ranks=num_ranks)]
    except ValueError:
        counts = [local_tensor(parameter).shape[0]]
    return {
        "name": name,
        "shape": list(parameter.shape),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "placement": describe_placement(parameter) + (", on purpose" if name in copies else ""),
        "rows_a_rank": [min(counts), max(counts)],
    }


def to_json(found: Rehearsal, recipe: Recipe, *, passed: bool) -> dict[str, Any]:
    """What goes to ``rehearse.json``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": "PASS" if passed else "FAIL",
        "recipe": recipe.name,
        **asdict(found),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe-json", required=True)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Rehearse, print the report, write the JSON. Returns the exit code."""
    options = _arguments()
    logging.getLogger("moe_recipes").setLevel(logging.WARNING)
    recipe = recipe_from_dict(json.loads(options.recipe_json))
    ranks = list(range(recipe.parallel.num_ranks)) if options.all else sampled_ranks(recipe)
    try:
        found = rehearse(recipe, ranks, options.folder)
    except MoeRecipesError as error:
        return say_error(str(error), error.exit_code, as_json=options.json)
    passed = not found.problems
    record = to_json(found, recipe, passed=passed)
    write_json(options.folder / "rehearse.json", record)
    if options.json:
        print(json.dumps(record))
    else:
        print("\n".join(report_lines(record, optimizer=recipe.optim.name)))
        print(f"\n{record['verdict']}: {options.folder / 'rehearse.json'}")
    return EXIT_OK if passed else NotFiniteError.exit_code


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
