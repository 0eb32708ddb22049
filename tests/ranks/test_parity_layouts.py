"""One optimizer step on every layout equals one process of plain Transformers."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from moe_recipes.data.loader import Batch
from moe_recipes.models.loss import remove_loss
from moe_recipes.train.loop import train_step
from moe_recipes.train.run import Run
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import (
    CLIP,
    NUM_MICROBATCHES,
    NUM_ROWS,
    SEQ_LEN,
    TOLERANCE,
    build_run,
    rank_batches,
    relative_error,
    whole,
    whole_gradients,
    worst,
    write_reference,
)

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a family's reference, computed once, in a process of its own."""
    root = tmp_path_factory.mktemp("parity")

    def folder(family: str) -> Path:
        if not (root / family / "reference.pt").exists():
            run_on_ranks(write_reference, 1, family, root / family)
        return root / family

    return folder


@torch.no_grad()
def check_logits(run: Run, family: str, expected: torch.Tensor) -> None:
    """The model's own logits of this rank's rows, through its own forward."""
    for batch in rank_batches(family):
        logits = run.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        assert relative_error(logits, expected[list(batch.row_ids)]) <= TOLERANCE


def check_step(family: str, folder: Path, ep_size: int, dp_replicate_size: int, checkpointing: str) -> None:
    reference = torch.load(folder / "reference.pt")
    run = build_run(
        folder / "weights", ep_size=ep_size, dp_replicate_size=dp_replicate_size, checkpointing=checkpointing
    )
    assert reference["grad_norm"] > 2 * CLIP
    clipped: dict[str, torch.Tensor] = {}
    run.optimizer.register_step_pre_hook(lambda *_: clipped.update(whole_gradients(run.model)))
    stats = train_step(run, rank_batches(family))

    assert stats.num_label_tokens == reference["num_labels"]
    assert stats.num_tokens == NUM_ROWS * SEQ_LEN
    assert abs(stats.loss / reference["loss"] - 1) <= TOLERANCE
    assert abs(stats.grad_norm / reference["grad_norm"] - 1) <= TOLERANCE
    factor = CLIP / reference["grad_norm"]
    error, name = worst(clipped, {name: factor * gradient for name, gradient in reference["gradients"].items()})
    assert error <= TOLERANCE, f"gradient of {name}: {error:.1e}"
    error, name = worst({name: whole(p) for name, p in run.model.named_parameters()}, reference["after"])
    assert error <= TOLERANCE, f"{name} after the step: {error:.1e}"
    for name, buffer in run.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(buffer, reference["buffers"][name]), name
    remove_loss(run.model)
    check_logits(run, family, reference["logits_after"])


def check_logits_before(family: str, folder: Path, ep_size: int) -> None:
    run = build_run(folder / "weights", ep_size=ep_size)
    remove_loss(run.model)
    check_logits(run, family, torch.load(folder / "reference.pt")["logits"])


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "dp_replicate_size", "checkpointing"),
    [
        (1, 1, 1, "none"),
        (2, 1, 1, "full"),
        (2, 2, 1, "none"),
        (4, 2, 1, "full"),
        (4, 2, 2, "none"),
        (4, 4, 1, "none"),
        (8, 4, 1, "full"),
        slow(1, 1, 1, "full"),
        slow(2, 1, 1, "none"),
        slow(2, 1, 2, "none"),
        slow(2, 2, 1, "full"),
        slow(4, 1, 1, "full"),
        slow(4, 2, 1, "none"),
        slow(4, 4, 1, "full"),
        slow(8, 2, 2, "full"),
        slow(8, 4, 1, "none"),
        slow(8, 4, 2, "none"),
        slow(8, 8, 1, "none"),
    ],
)
def test_qwen3_moe_step(references, num_ranks, ep_size, dp_replicate_size, checkpointing):
    folder = references("qwen3_moe")
    run_on_ranks(check_step, num_ranks, "qwen3_moe", folder, ep_size, dp_replicate_size, checkpointing)


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size", "checkpointing"),
    [
        ("deepseek_v3", 4, 2, "full"),
        ("gpt_oss", 2, 2, "full"),
        ("nemotron_h", 2, 2, "full"),
        *(
            slow(family, ranks, ep, checkpointing)
            for family in FAMILIES[1:]
            for ranks, ep, checkpointing in [
                (1, 1, "none"),
                (2, 1, "full"),
                (4, 2, "none"),
                (4, 4, "full"),
                (8, 4, "full"),
            ]
        ),
    ],
)
def test_family_step(references, family, num_ranks, ep_size, checkpointing):
    run_on_ranks(check_step, num_ranks, family, references(family), ep_size, 1, checkpointing)


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size"),
    [("qwen3_moe", 2, 2), *(slow(family, 4, 4) for family in FAMILIES)],
)
def test_logits(references, family, num_ranks, ep_size):
    run_on_ranks(check_logits_before, num_ranks, family, references(family), ep_size)


def check_starved_step(folder: Path, ep_size: int, checkpointing: str) -> None:
    check_step("qwen3_moe_starved", folder, ep_size, 1, checkpointing)


def check_load(folder: Path, ep_size: int) -> None:
    run = build_run(folder / "weights", ep_size=ep_size)
    counts = train_step(run, rank_batches("qwen3_moe_starved")).expert_counts
    assert counts is not None
    assert counts.tolist() == [[NUM_ROWS * SEQ_LEN] * 2 + [0] * 6] * 2


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "checkpointing"), [(4, 4, "full"), slow(2, 2, "none"), slow(8, 4, "none")]
)
def test_ranks_that_receive_no_token(references, num_ranks, ep_size, checkpointing):
    folder = references("qwen3_moe_starved")
    run_on_ranks(check_starved_step, num_ranks, folder, ep_size, checkpointing)
    run_on_ranks(check_load, num_ranks, folder, ep_size)


def test_the_step_is_ragged():
    """What the reference step must hold to test anything: microbatches and ranks without labels beside full ones."""

    def counts() -> None:
        mine = [batch.num_label_tokens for batch in rank_batches("qwen3_moe")]
        assert len(mine) == NUM_MICROBATCHES
        everyone: list = [None] * 8
        dist.all_gather_object(everyone, mine)
        assert [rank for rank, (first, second) in enumerate(everyone) if first == second == 0] == [2, 3]
        assert everyone[5][0] == 1
        assert max(map(max, everyone)) > 20

    run_on_ranks(counts, 8)


def outputs_of_documents(plain: torch.nn.Module, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Router logits of each layer ``[B * S, E]`` and logits ``[B * S, V]``, every document of the rows alone."""
    outputs = []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        borders = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(borders):
            outputs.append(plain(input_ids=ids[None, start:end], use_cache=False, output_router_logits=True))
    layers = zip(*(out.router_logits for out in outputs), strict=True)
    return [torch.cat(layer) for layer in layers], torch.cat([out.logits[0] for out in outputs])


def check_aux_loss(family: str, folder: Path, ep_size: int, checkpointing: str) -> None:
    """Mean of Transformers' load-balancing loss over all microbatches of all ranks, beside the mean over labels.

    The last tokens of every row pass for padding, which Transformers leaves out by its attention mask.
    """
    coef, ranks = 0.5, dist.get_world_size()
    run = build_run(folder / "weights", ep_size=ep_size, checkpointing=checkpointing, router_aux_loss_coef=coef)
    seen: dict[str, torch.Tensor] = {}
    run.optimizer.register_step_pre_hook(lambda *_: seen.update(whole_gradients(run.model)))
    real = torch.arange(SEQ_LEN) < SEQ_LEN - 5
    batches = [dataclasses.replace(b, real_tokens=real.expand_as(b.input_ids)) for b in rank_batches(family)]
    stats = train_step(run, batches)

    plain = AutoModelForCausalLM.from_pretrained(
        folder / "weights", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    aux_sum = 0.0
    for batch in batches:
        router_logits, logits = outputs_of_documents(plain, batch)
        aux = load_balancing_loss_func(tuple(router_logits), 8, 2, attention_mask=batch.real_tokens)
        loss = F.cross_entropy(logits, batch.shift_labels.flatten(), reduction="sum")
        (loss / stats.num_label_tokens + coef * aux / (ranks * NUM_MICROBATCHES)).backward()
        aux_sum += float(aux.detach()) / (ranks * NUM_MICROBATCHES)
    total = torch.tensor(aux_sum, dtype=torch.float64)
    dist.all_reduce(total)
    assert abs(stats.aux_loss / float(total) - 1) <= TOLERANCE
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for gradient in wanted.values():
        dist.all_reduce(gradient)
    norm = sum(float(gradient.double().square().sum()) for gradient in wanted.values()) ** 0.5
    assert abs(stats.grad_norm / norm - 1) <= TOLERANCE
    error, name = worst(seen, {name: CLIP / norm * gradient for name, gradient in wanted.items()})
    assert error <= TOLERANCE, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size", "checkpointing"),
    [
        ("qwen3_moe", 2, 2, "full"),
        ("gpt_oss", 2, 2, "full"),
        slow("qwen3_moe", 1, 1, "none"),
        slow("qwen3_moe", 4, 2, "full"),
        slow("gpt_oss", 4, 2, "none"),
    ],
)
def test_load_balancing_loss(references, family, num_ranks, ep_size, checkpointing):
    run_on_ranks(check_aux_loss, num_ranks, family, references(family), ep_size, checkpointing)
