"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_recipes.config.errors import NotFiniteError, StoppedError
from moe_recipes.data.loader import Batch
from moe_recipes.models.loss import Losses
from moe_recipes.models.packing import borders_found_on_the_host
from moe_recipes.moe.balance import update_correction_biases
from moe_recipes.moe.expert_load import count_only
from moe_recipes.moe.symmetric import NAME as SYMMETRIC
from moe_recipes.moe.symmetric import RoutedRows
from moe_recipes.plan.flops import FORMULA, peak_flops, train_flops_per_token
from moe_recipes.runtime.sharding import reshard
from moe_recipes.runtime.stop import StopFlag, switch_is_on
from moe_recipes.runtime.world import barrier, max_over_ranks, sum_over_ranks
from moe_recipes.train.metrics import Metrics, balance_record, device_memory
from moe_recipes.train.optim import learning_rate
from moe_recipes.train.run import Run
from moe_recipes.train.saves import Saver
from moe_recipes.train.shakedown import die_if_asked, dies_on_request
from moe_recipes.train.wandb_log import WandbLog

logger = logging.getLogger("moe_recipes")


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One optimizer step, global: equal on all ranks."""

    loss: float
    """Mean over the step's label tokens."""

    aux_loss: float
    """Mean load-balancing loss of ranks and microbatches, before its coefficient; 0 without one."""

    z_loss: float
    """Likewise, the router z-loss."""

    mtp_loss: float
    """Multi-token-prediction loss before its coefficient: mean over the depths, over the step's label tokens."""

    expert_counts: Tensor | None
    """Tokens of each expert over all ranks and microbatches, int64 on the CPU ``[layers, E]``; None without experts."""

    grad_norm: float
    lr: float
    num_label_tokens: int
    num_tokens: int


def load_step(run: Run, step: int) -> list[Batch]:
    """The microbatches of a step on this rank, in pinned memory for a GPU: copies from other memory wait for it."""
    batches = run.batches.step(step)
    if run.world.device.type != "cuda":
        return batches
    names = ("input_ids", "position_ids", "shift_labels", "real_tokens")
    tensors = [{name: tensor for name in names if (tensor := getattr(batch, name)) is not None} for batch in batches]
    return [
        replace(batch, **{name: tensor.pin_memory() for name, tensor in found.items()})
        for batch, found in zip(batches, tensors, strict=True)
    ]


def batch_loss(run: Run, batch: Batch) -> Losses:
    """The losses of one microbatch on this rank."""
    device = run.world.device
    # Without packing the positions are 0, 1, 2 ...: left out, attention takes its plain causal kernel.
    packed = run.recipe.data.format != "random_tokens"
    extra = {"position_ids": batch.position_ids.to(device, non_blocking=True)} if packed else {}
    real = None if batch.real_tokens is None else batch.real_tokens.to(device, non_blocking=True)
    with borders_found_on_the_host(batch.position_ids, device), count_only(real):
        return run.model(
            input_ids=batch.input_ids.to(device, non_blocking=True),
            shift_labels=batch.shift_labels.to(device, non_blocking=True),
            **extra,
        )


def forward_backward(run: Run, batches: list[Batch], *, num_label_tokens: float) -> Tensor:
    """Gradients of all microbatches; returns this rank's shares of the mean losses ``[4]``: of the label tokens, the
    load-balancing loss, the router z-loss, the multi-token-prediction loss."""
    recipe, labels = run.recipe.train, max(1.0, num_label_tokens)
    batches_of_step = len(batches) * run.dp_size
    shares = torch.zeros(4, device=run.world.device)
    for batch in batches:
        losses = batch_loss(run, batch)
        target = losses.total / labels  # a share: gradients are summed over ranks and microbatches
        shares[0] += losses.label.detach() / labels
        for index, loss, coef in (
            (1, losses.aux, recipe.router_aux_loss_coef),
            (2, losses.z, recipe.router_z_loss_coef),
        ):
            if loss is not None:
                target = target + coef * (loss / batches_of_step)
                shares[index] += loss.detach() / batches_of_step
        if losses.mtp is not None:
            shares[3] += losses.mtp / labels
        target.backward()
    return shares


def exact_gradients(run: Run, batches: list[Batch], *, num_label_tokens: float) -> tuple[list[float], float]:
    """Gradients of the step; returns the mean losses of ``forward_backward`` over all ranks, and the gradient norm.

    Where routed rows did not fit into what the symmetric dispatcher had made room for, on any rank, all ranks compute
    the step again without it, from the same random state: that costs time and changes nothing else.
    """
    device, random_states = run.world.device, _random_states(run)
    with RoutedRows(run.recipe.parallel.expert_capacity_factor) as rows:
        shares = forward_backward(run, batches, num_label_tokens=num_label_tokens)
    # The step's one wait for the device outside the layers: a step that is not finite must change no weight.
    found = torch.cat([shares, run.clip.norm()[None], rows.counts(device)]).tolist()
    shares_here, grad_norm, counts = found[: len(shares)], found[len(shares)], found[len(shares) + 1 :]
    *losses, missing = sum_over_ranks(*shares_here, rows.missing(counts))
    if missing == 0:
        rows.learn(counts)
        return losses, grad_norm
    if run.world.is_main:
        logger.warning("step %d: no room for all routed rows; computed again by all-to-all", run.step + 1)
    run.optimizer.zero_grad(set_to_none=True)
    if run.load is not None:
        run.load.counts_LE.zero_()
    torch.set_rng_state(random_states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(random_states[1], device)
    with RoutedRows(None) as rows:
        shares = forward_backward(run, batches, num_label_tokens=num_label_tokens)
    rows.learn([])
    *shares_here, grad_norm = torch.cat([shares, run.clip.norm()[None]]).tolist()
    return sum_over_ranks(*shares_here), grad_norm


def _random_states(run: Run) -> list[Tensor]:
    """Of the CPU and the GPU; both live on the host. None where no step is computed again."""
    if run.recipe.parallel.ep_implementation != SYMMETRIC:
        return []
    device = run.world.device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def train_step(run: Run, batches: list[Batch]) -> StepStats:
    """One optimizer step. The loss and every gradient weigh each label token of the whole step alike.

    Raises:
        NotFiniteError: on all ranks, before any weight has changed.
    """
    labels, tokens = sum_over_ranks(sum(b.num_label_tokens for b in batches), sum(b.num_tokens for b in batches))
    (loss_sum, aux_loss, z_loss, mtp_loss), grad_norm = exact_gradients(run, batches, num_label_tokens=labels)
    if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
        rows = [row for batch in batches for row in batch.row_ids]
        logger.error("rank %d read the packed rows %s in step %d", run.world.rank, rows, run.step + 1)
        raise NotFiniteError(
            f"step {run.step + 1}: loss {loss_sum}, gradient norm {grad_norm}; weights were left as they were;"
            f" lower optim.lr, or look at the rows that the log names"
        )
    # Here, where the device has nothing left to do, so that the copy to the host waits for nothing.
    counts = run.load.collect() if run.load is not None else None
    run.clip.scale(grad_norm, run.optimizer)
    lr = learning_rate(run.recipe.optim, step=run.step, steps=run.recipe.train.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.load is not None and counts is not None:
        rate = run.recipe.train.router_bias_update_rate
        update_correction_biases(run.moving_biases, run.load.layers, counts, rate=rate)
    run.step += 1
    return StepStats(
        loss=loss_sum,
        aux_loss=aux_loss,
        z_loss=z_loss,
        mtp_loss=mtp_loss,
        expert_counts=counts,
        grad_norm=grad_norm,
        lr=lr,
        num_label_tokens=int(labels),
        num_tokens=int(tokens),
    )


@torch.no_grad()
def validate(run: Run) -> float:
    """Mean loss over the label tokens of the held-out batches. Every rank calls it."""
    assert run.validation is not None
    run.model.eval()
    loss, labels = 0.0, 0
    for batch in run.validation.step(0):
        loss += float(batch_loss(run, batch).label)
        labels += batch.num_label_tokens
    run.model.train()
    reshard(run.model)
    loss_sum, label_sum = sum_over_ranks(loss, labels)
    return loss_sum / max(1.0, label_sum)


class Reporter:
    """Turns steps into records; the collectives are on every rank, the writing on rank 0."""

    def __init__(self, run: Run, saver: Saver) -> None:
        self.run, self.saver = run, saver
        recipe = run.recipe
        self.flops = train_flops_per_token(run.source.config, seq_len=recipe.data.seq_len)
        name = torch.cuda.get_device_name(run.world.device) if run.world.device.type == "cuda" else "CPU"
        self.peak = peak_flops(name)
        self.metrics = self.wandb = None
        self.first_step = run.step + 1
        if run.world.is_main:
            self.metrics = Metrics(run.folder.metrics, first_step=run.step, total_steps=recipe.train.steps)
            self.wandb = WandbLog(
                run.folder.path,
                mode=recipe.log.wandb,
                project=recipe.log.wandb_project,
                name=recipe.name,
                config={"device": name, "flops_per_token": self.flops},
            )
            run.folder.update_manifest(
                device=name, mfu={"formula": FORMULA, "flops_per_token": self.flops, "peak_flops": self.peak}
            )

    def report(self, stats: StepStats, *, step_s: float, data_wait_s: float) -> None:
        """Log one step on the screen, in metrics.jsonl and to W&B."""
        run, recipe = self.run, self.run.recipe
        memory = device_memory(run.world.device)
        slowest_s, wait_s, allocated, reserved = max_over_ranks(step_s, data_wait_s, *memory.values())
        per_gpu = stats.num_tokens / slowest_s / run.world.size
        mfu = per_gpu * self.flops / self.peak if self.flops and self.peak else None
        record: dict[str, Any] = {
            "step": run.step,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "lr": stats.lr,
            "tokens_per_s": stats.num_tokens / slowest_s,
            "tokens_per_s_per_gpu": per_gpu,
            "mfu": mfu,
            "step_s": slowest_s,
            "data_wait_s": wait_s,
            "num_tokens": stats.num_tokens,
            "num_label_tokens": stats.num_label_tokens,
            "epoch": run.batches.epoch_of(run.step),
            "memory_allocated_gib": allocated,
            "memory_reserved_gib": reserved,
            "dropped_tokens": 0,
            "gpu": run.world.device.type == "cuda",
        }
        record |= balance_record(run, stats) | self.saver.record()
        if run.validation is not None and run.step % recipe.train.validate_every_steps == 0:
            start = time.perf_counter()
            record["validation_loss"] = validate(run)
            run.validation_loss = run.step, record["validation_loss"]
            record["validation_s"] = time.perf_counter() - start
        if self.metrics is not None and self.wandb is not None:
            self.metrics.write(record)
            self.wandb.log(run.step, record)
            if run.step % recipe.log.every_steps == 0 or run.step == recipe.train.steps:
                extra = f" | validation {record['validation_loss']:.4f}" if "validation_loss" in record else ""
                logger.info("%s%s", self.metrics.line(record), extra)
            run.folder.write_status("running", step=run.step, last_durable_step=run.last_durable_step)
            if run.step == self.first_step:
                run.folder.append_event("first step", step=run.step, step_s=round(step_s, 3))

    def close(self) -> None:
        if self.metrics is not None and self.wandb is not None:
            self.metrics.close()
            self.wandb.close()


def _requests(run: Run, stop: StopFlag, saver: Saver) -> tuple[bool, bool, bool, bool]:
    """``(signal, STOP file, SAVE file)``: what any rank was asked; and whether a save has ended on any. All agree."""
    files = (run.folder.stop_file, run.folder.save_file)
    seen = [switch_is_on(path) for path in files] if run.world.is_main else [False, False]
    asked = max_over_ranks(float(stop.signal_name is not None), *map(float, seen), float(saver.has_landed))
    return bool(asked[0]), bool(asked[1]), bool(asked[2]), bool(asked[3])


def train(run: Run, stop: StopFlag) -> str:
    """Train until the recipe's last step, or until somebody asks to stop. Every rank calls this.

    Returns:
        ``"done"``, or ``"stopped"`` where ``RUN/STOP`` was there; the run is saved either way.
    Raises:
        StoppedError: a signal came to any rank; the run is saved and can be started again.
    """
    saver = Saver(run)
    reporter = Reporter(run, saver)
    try:
        state = _train(run, stop, saver, reporter)
    except StoppedError:
        reporter.close()
        raise
    finally:
        saver.drain()
    reporter.close()
    barrier()
    return state


def _train(run: Run, stop: StopFlag, saver: Saver, reporter: Reporter) -> str:
    recipe = run.recipe
    last_step, every = recipe.train.steps, recipe.checkpoint.every_steps
    with ThreadPoolExecutor(max_workers=1) as loader:
        upcoming = loader.submit(load_step, run, run.step)
        while run.step < last_step:
            start = time.perf_counter()
            batches = upcoming.result()
            data_wait_s = time.perf_counter() - start
            if run.step + 1 < last_step:
                upcoming = loader.submit(load_step, run, run.step + 1)
            stats = train_step(run, batches)
            reporter.report(stats, step_s=time.perf_counter() - start, data_wait_s=data_wait_s)
            signalled, stopped, asked_to_save, landed = _requests(run, stop, saver)
            if landed:
                saver.finish()
            finished = run.step == last_step and recipe.checkpoint.save_last
            wanted = signalled or stopped or asked_to_save or finished
            if wanted or (every and run.step % every == 0):
                saver.save(wait=wanted or dies_on_request())
                die_if_asked(run.folder, rank=run.world.rank, step=run.step)
                if run.world.is_main and asked_to_save:
                    run.folder.save_file.unlink(missing_ok=True)
                if run.world.is_main and stopped:
                    run.folder.stop_file.unlink(missing_ok=True)  # done as asked: the next start trains on
            if run.step < last_step and (signalled or stopped):
                if signalled:
                    raise StoppedError(f"stopped by a signal after step {run.step}; saved, start it again to continue")
                return "stopped"
    saver.finish()
    return "done"
