"""Correction biases and the z-loss on ranks, against one process of eager Transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.nn import functional as F

from moe_recipes.config.errors import RecipeError
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.blocks import moe_blocks
from moe_recipes.train.loop import balance_record, train_step
from moe_recipes.train.resume import resume
from moe_recipes.train.run import Run
from moe_recipes.train.saves import save
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import (
    CLIP,
    NUM_MICROBATCHES,
    NUM_ROWS,
    SEQ_LEN,
    TOLERANCE,
    build_run,
    documents,
    honour_time_step_limit,
    rank_batches,
    save_weights,
    whole_gradients,
    worst,
)
from tests.ranks.test_mtp import save_weights as save_with_mtp
from tests.ranks.test_parity_layouts import outputs_of_documents

BIASED = ("deepseek_v3", "nemotron_h")
RATE = 0.01


def eager(folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    honour_time_step_limit(model)
    return model


def biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}


@torch.no_grad()
def write_biases(family: str, folder: Path) -> None:
    """Biases after a step by the sign rule, and the counts, from each document alone through eager Transformers."""
    save_weights(family, folder / "weights")
    model = eager(folder / "weights")
    counts: dict[str, torch.Tensor] = {}

    def count(name: str):
        def hook(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
            counts[name] = counts.get(name, 0) + torch.bincount(output[2].flatten(), minlength=8)

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(count(name))
    for document in documents(family):
        model(input_ids=document.input_ids[None], use_cache=False)
    after = {}
    for name, bias in biases(model).items():
        load = counts[name.rpartition(".")[0]].tolist()
        mean = sum(load) / len(load)
        steps = [RATE if n < mean else -RATE if n > mean else 0.0 for n in load]
        after[name] = bias + torch.tensor(steps, dtype=torch.float32)
    assert len(after) == 2
    torch.save({"after": after, "counts": list(counts.values())}, folder / "biases.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("biases")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            run_on_ranks(write_biases if family in BIASED else save_weights_of, 1, family, root / family)
        return root / family

    return folder


def save_weights_of(family: str, folder: Path) -> None:
    save_weights(family, folder / "weights")


def check_bias_step(family: str, folder: Path, ep_size: int, checkpointing: str) -> None:
    reference = torch.load(folder / "biases.pt")
    run = build_run(folder / "weights", ep_size=ep_size, checkpointing=checkpointing, router_bias_update_rate=RATE)
    before = biases(run.model)
    stats = train_step(run, rank_batches(family))
    assert stats.expert_counts is not None
    assert stats.expert_counts.tolist() == [counts.tolist() for counts in reference["counts"]]
    now = biases(run.model)
    assert all(bias.dtype == torch.float32 for bias in now.values())
    for name, wanted in reference["after"].items():
        assert torch.equal(now[name], wanted), name
        assert not torch.equal(now[name], before[name]), name
    run.step = 1
    record = balance_record(run, stats)
    layers = run.load.layers
    worst_of = [max(counts.tolist()) / counts.double().mean().item() - 1 for counts in reference["counts"]]
    assert record["max_violation"] == pytest.approx(max(worst_of))
    assert record["max_violation_of_layer"] == pytest.approx(dict(zip(layers, worst_of, strict=True)), abs=1e-4)
    dead = [int((counts == 0).sum()) for counts in reference["counts"]]
    assert (record["dead_experts"], record["dead_experts_of_layer"]) == (
        sum(dead),
        dict(zip(layers, dead, strict=True)),
    )


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size", "checkpointing"),
    [
        ("deepseek_v3", 2, 2, "full"),
        ("nemotron_h", 2, 2, "full"),
        pytest.param("deepseek_v3", 1, 1, "none", marks=pytest.mark.slow),
        pytest.param("nemotron_h", 4, 2, "full", marks=pytest.mark.slow),
    ],
)
def test_biases_move_by_the_sign_of_the_load_over_all_ranks_and_microbatches(
    folders, family, num_ranks, ep_size, checkpointing
):
    run_on_ranks(check_bias_step, num_ranks, family, folders(family), ep_size, checkpointing)


def check_what_counts(folder: Path) -> None:
    """Tokens that are not padding; in the layer of multi-token prediction those with another after them."""
    run = build_run(folder, ep_size=2, router_bias_update_rate=RATE)
    kept = torch.arange(SEQ_LEN) < SEQ_LEN - 3
    batches = [dataclasses.replace(b, real_tokens=kept.expand_as(b.input_ids)) for b in rank_batches("deepseek_v3")]
    counts = train_step(run, batches).expert_counts
    last = {(d.row, d.start + len(d.input_ids) - 1) for d in documents("deepseek_v3")}
    inside = sum((row, at) not in last for row in range(NUM_ROWS) for at in range(SEQ_LEN - 3))
    assert run.load.layers == [1, 2, 3]
    assert counts.sum(dim=1).tolist() == [2 * NUM_ROWS * (SEQ_LEN - 3)] * 2 + [2 * inside]


def test_padding_and_what_follows_a_document_does_not_count(tmp_path):
    run_on_ranks(save_with_mtp, 1, "deepseek_v3_mtp", tmp_path / "weights")
    run_on_ranks(check_what_counts, 2, tmp_path / "weights")


def check_frozen_biases(folder: Path) -> None:
    run = build_run(folder / "weights", ep_size=2)
    before = biases(run.model)
    for _ in range(2):
        train_step(run, rank_batches("deepseek_v3"))
    now = biases(run.model)
    assert all(torch.equal(now[name], bias) for name, bias in before.items())


def test_without_a_rate_the_biases_are_the_same_bits(folders):
    run_on_ranks(check_frozen_biases, 2, folders("deepseek_v3"))


def everything(run: Run) -> dict[str, torch.Tensor]:
    return {name: entry.tensor.clone() for name, entry in run.entries().items()}


def check_resume(family: str, folder: Path, run_dir: Path) -> None:
    """Four steps, and two steps, a checkpoint, and two more in a new run: the same bits, biases and MTP included."""

    def fresh(place: Path) -> Run:
        run = build_run(folder, ep_size=2, checkpointing="full", router_bias_update_rate=RATE)
        place.mkdir(exist_ok=True)
        run.folder = RunFolder(place)
        return run

    batches = rank_batches(family.removesuffix("_mtp"))
    straight = fresh(run_dir)
    started = biases(straight.model)
    for _ in range(4):
        train_step(straight, batches)
    first = fresh(run_dir)
    for _ in range(2):
        train_step(first, batches)
    save(first)
    second = fresh(run_dir)
    resume(second)
    assert second.step == 2
    for _ in range(2):
        train_step(second, batches)
    wanted, got = everything(straight), everything(second)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    moved = biases(second.model)
    assert len(moved) == 3  # two layers and the one of multi-token prediction
    assert all(not torch.equal(moved[name], bias) for name, bias in started.items())


@pytest.mark.parametrize("family", ["nemotron_h_mtp", pytest.param("deepseek_v3_mtp", marks=pytest.mark.slow)])
def test_a_resumed_run_moves_its_biases_bit_for_bit(tmp_path, family):
    run_on_ranks(save_with_mtp, 1, family, tmp_path / "weights")
    run_on_ranks(check_resume, 2, family, tmp_path / "weights", tmp_path / "run")


def check_z_loss(family: str, folder: Path, ep_size: int, checkpointing: str) -> None:
    """Mean over microbatches of all ranks of ``mean_t logsumexp(logits_t)^2``, summed over layers."""
    coef, ranks = 0.05, dist.get_world_size()
    run = build_run(folder / "weights", ep_size=ep_size, checkpointing=checkpointing, router_z_loss_coef=coef)
    seen: dict[str, torch.Tensor] = {}
    run.optimizer.register_step_pre_hook(lambda *_: seen.update(whole_gradients(run.model)))
    stats = train_step(run, rank_batches(family))
    plain, z_sum = eager(folder / "weights"), 0.0
    for batch in rank_batches(family):
        router_logits, logits = outputs_of_documents(plain, batch)
        assert len(router_logits) == len(moe_blocks(run.model))
        z = sum(torch.log(layer.exp().sum(dim=1)).pow(2).mean() for layer in router_logits)
        loss = F.cross_entropy(logits, batch.shift_labels.flatten(), reduction="sum")
        (loss / stats.num_label_tokens + coef * z / (ranks * NUM_MICROBATCHES)).backward()
        z_sum += float(z.detach()) / (ranks * NUM_MICROBATCHES)
    total = torch.tensor(z_sum, dtype=torch.float64)
    dist.all_reduce(total)
    assert abs(stats.z_loss / float(total) - 1) <= TOLERANCE
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for gradient in wanted.values():
        dist.all_reduce(gradient)
    norm = sum(float(gradient.double().square().sum()) for gradient in wanted.values()) ** 0.5
    error, name = worst(seen, {name: CLIP / norm * gradient for name, gradient in wanted.items()})
    assert error <= TOLERANCE, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize(
    ("family", "num_ranks", "ep_size", "checkpointing"),
    [
        ("nemotron_h", 2, 2, "full"),
        pytest.param("deepseek_v3", 2, 1, "full", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 4, 2, "none", marks=pytest.mark.slow),
    ],
)
def test_z_loss(folders, family, num_ranks, ep_size, checkpointing):
    run_on_ranks(check_z_loss, num_ranks, family, folders(family), ep_size, checkpointing)


def check_refusals(deepseek: Path, qwen: Path) -> None:
    with pytest.raises(
        RecipeError, match="Transformers' DeepseekV3ForCausalLM has no load-balancing loss; set it to 0 and"
    ):
        build_run(deepseek / "weights", router_aux_loss_coef=0.01)
    with pytest.raises(RecipeError, match=r"router_bias_update_rate=0.01: the routers of Qwen3MoeForCausalLM have no"):
        build_run(qwen / "weights", router_bias_update_rate=0.01)


def test_a_switch_that_a_family_does_not_have_is_refused(folders):
    run_on_ranks(check_refusals, 1, folders("deepseek_v3"), folders("qwen3_moe"))
