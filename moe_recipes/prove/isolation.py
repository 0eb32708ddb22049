"""Whether documents see each other: one token of one document is flipped, and every other output must stay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_recipes.data.loader import Batch
from moe_recipes.models.mtp import mtp_of
from moe_recipes.prove.task import TOLERANCE, Check, Task
from moe_recipes.runtime.sharding import reshard
from moe_recipes.runtime.world import max_over_ranks
from moe_recipes.train.run import Run

ROW = 1
"""A packed row of the first microbatch, on every number of ranks."""


@torch.no_grad()
def forward(run: Run, batch: Batch, input_ids: Tensor) -> Tensor:
    """Logits ``[B, S, V]`` of the model's own forward pass, float32."""
    logits = run.model(input_ids=input_ids, position_ids=batch.position_ids, use_cache=False).logits.float()
    reshard(run.model)
    return logits


@torch.no_grad()
def _ahead(run: Run, batch: Batch, input_ids: Tensor) -> Tensor:
    """What multi-token prediction gives to the output projection ``[depths, B, S, D]``, in the trainer's own pass."""
    mtp, found = mtp_of(run.model), []
    assert mtp is not None

    def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        found.append(output[1].float())

    hooks = [block[-1].register_forward_hook(keep) for block in {id(block[-1]): block for block in mtp.blocks}.values()]
    run.model(input_ids=input_ids, position_ids=batch.position_ids, shift_labels=batch.shift_labels)
    for hook in hooks:
        hook.remove()
    reshard(run.model)
    return torch.stack(found)


def _flipped(run: Run, batch: Batch, place: int) -> tuple[Tensor, list[int]]:
    """The batch's tokens with another one at ``place`` of ``ROW``, and the rows here that this changes."""
    flipped = batch.input_ids.clone()
    mine = [index for index, number in enumerate(batch.row_ids) if number == ROW]
    for index in mine:
        flipped[index, place] = (flipped[index, place] + 1) % run.source.vocab_size
    return flipped, mine


def _verdict(name: str, moved_BS: Tensor, may_move_BS: Tensor, *, what: str) -> Check:
    """Passed if nothing moved outside of ``may_move_BS``, on any rank. Something inside must have: a proof that looks
    at nothing passes anything."""
    leak = float(moved_BS.masked_fill(may_move_BS, 0).max())
    moved = float(moved_BS.masked_fill(~may_move_BS, 0).max())
    leak, moved = (value if math.isfinite(value) else math.inf for value in max_over_ranks(leak, moved))
    if moved <= 100 * TOLERANCE:
        return Check(name=name, passed=False, value=moved, limit=None, found="a flipped token moved nothing at all")
    passed = leak <= TOLERANCE
    said = f"{what} do not see each other" if passed else f"a flipped token moved the output of other {what}"
    return Check(name=name, passed=passed, value=leak, limit=TOLERANCE, found=said)


def document_isolation(run: Run, batch: Batch, task: Task) -> Check:
    """No logits of another document, row or rank move, nor one before the token in its own."""
    own = min((d for d in task.documents() if d.row == ROW), key=lambda d: d.start)
    place = own.start + (own.end - own.start) // 2
    flipped, mine = _flipped(run, batch, place)
    before, after = forward(run, batch, batch.input_ids), forward(run, batch, flipped)
    moved_BS = (after - before).norm(dim=-1) / before.norm(dim=-1)
    may_move_BS = torch.zeros_like(moved_BS, dtype=torch.bool)
    for index in mine:
        may_move_BS[index, place : own.end] = True
    what = "documents of a row" if task.packed else "rows"
    return _verdict("document isolation", moved_BS, may_move_BS, what=what)


def mtp_isolation(run: Run, batch: Batch, task: Task) -> Check:
    """The same of multi-token prediction, which looks ahead: the flipped token is the first of a row's last document,
    so that the document before it would see it."""
    own = max((d for d in task.documents() if d.row == ROW), key=lambda d: d.start)
    flipped, mine = _flipped(run, batch, own.start)
    before, after = _ahead(run, batch, batch.input_ids), _ahead(run, batch, flipped)
    moved_BS = ((after - before).norm(dim=-1) / before.norm(dim=-1)).amax(dim=0)
    may_move_BS = torch.zeros_like(moved_BS, dtype=torch.bool)
    for index in mine:
        may_move_BS[index, own.start : own.end] = True
    what = "documents of a row" if task.packed else "rows"
    return _verdict("MTP document isolation", moved_BS, may_move_BS, what=what)
