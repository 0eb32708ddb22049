"""Multi-token prediction on ranks: loaded, trained, frozen and exported, against a slow reference in one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moe_recipes.config.errors import CorruptCheckpointError, RecipeError
from moe_recipes.config.recipe import Data, Model, Optim, Parallel, Recipe, Train
from moe_recipes.models.build import read_source
from moe_recipes.models.loss import Losses, Wanted, install_loss, remove_loss
from moe_recipes.train.loop import batch_loss, train_step
from moe_recipes.train.run import make_model
from tests.ranks.launch import run_on_ranks
from tests.ranks.mtp_reference import mtp_loss
from tests.ranks.parity import (
    CLIP,
    SEQ_LEN,
    TOLERANCE,
    boost,
    build_run,
    documents,
    honour_time_step_limit,
    rank_batches,
    whole,
    whole_gradients,
    worst,
)
from tests.ranks.test_export_ranks import export_on_ranks, read_folder
from tests.tiny_models import add_mtp, mtp_tensors, save_tiny_model, tiny_config

FAMILIES = ("deepseek_v3_mtp", "nemotron_h_mtp")
COEF = 0.3


def base(family: str) -> str:
    return family.removesuffix("_mtp")


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint under the names and in the shapes of the model: the experts of a layer together."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name and not name.endswith("correction_bias")}
    prefixes = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for at in prefixes:

        def stack(part: str, at: str = at) -> torch.Tensor:
            return torch.stack([tensors[f"{at}.experts.{e}.{part}_proj.weight"] for e in range(8)])

        found[f"{at}.experts.down_proj"] = stack("down")
        gated = f"{at}.experts.0.gate_proj.weight" in tensors
        up = torch.cat([stack("gate"), stack("up")], dim=1) if gated else stack("up")
        found[f"{at}.experts.{'gate_up_proj' if gated else 'up_proj'}"] = up
    return found


def save_weights(family: str, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    boost(model)
    model.save_pretrained(folder)
    add_mtp(family, folder)


def write_reference(family: str, folder: Path) -> None:
    """One step's losses and gradients, every document alone."""
    save_weights(family, folder / "weights")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "weights", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    honour_time_step_limit(model)
    model.train()
    leaves = {name: tensor.requires_grad_() for name, tensor in mtp_tensors(family).items()}
    embed, examples = model.get_input_embeddings().weight, documents(base(family))
    num_labels, label, mtp = sum(int(d.learned.sum()) for d in examples), 0.0, 0.0
    for d in examples:
        hidden = model.base_model(input_ids=d.input_ids[None], use_cache=False)[0][0]
        each = F.cross_entropy(hidden[:-1] @ model.lm_head.weight.T, d.input_ids[1:], reduction="none")
        own = (each * d.learned[1:]).sum() / num_labels
        ahead = mtp_loss(family, leaves, embed, model.lm_head.weight, hidden, d.input_ids, d.learned) / num_labels
        (own + COEF * ahead).backward()
        label, mtp = label + float(own.detach()), mtp + float(ahead.detach())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients |= fused({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    torch.save({"loss": label, "mtp": mtp, "gradients": gradients, "norm": norm}, folder / "reference.pt")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("mtp")

    def folder(family: str) -> Path:
        if not (root / family / "reference.pt").exists():
            run_on_ranks(write_reference, 1, family, root / family)
        return root / family

    return folder


def check_step(family: str, folder: Path, ep_size: int, checkpointing: str) -> None:
    reference = torch.load(folder / "reference.pt")
    run = build_run(folder / "weights", ep_size=ep_size, checkpointing=checkpointing, mtp_loss_coef=COEF)
    loaded = {name: whole(p) for name, p in run.model.named_parameters() if is_mtp(name, family)}
    clipped: dict[str, torch.Tensor] = {}
    run.optimizer.register_step_pre_hook(lambda *_: clipped.update(whole_gradients(run.model)))
    stats = train_step(run, rank_batches(base(family)))
    wanted = fused(mtp_tensors(family))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    assert abs(stats.loss / reference["loss"] - 1) <= TOLERANCE
    assert abs(stats.mtp_loss / reference["mtp"] - 1) <= TOLERANCE
    assert abs(stats.grad_norm / reference["norm"] - 1) <= TOLERANCE
    factor = CLIP / reference["norm"]
    error, name = worst(clipped, {name: factor * gradient for name, gradient in reference["gradients"].items()})
    assert error <= TOLERANCE, f"gradient of {name}: {error:.1e}"
    assert all(not torch.equal(whole(p), loaded[n]) for n, p in run.model.named_parameters() if n in loaded)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "checkpointing"),
    [
        (1, 1, "none"),
        (2, 2, "full"),
        pytest.param(2, 1, "full", marks=pytest.mark.slow),
        pytest.param(4, 2, "full", marks=pytest.mark.slow),
    ],
)
def test_step_equals_the_slow_reference(references, family, num_ranks, ep_size, checkpointing):
    run_on_ranks(check_step, num_ranks, family, references(family), ep_size, checkpointing)


def is_mtp(name: str, family: str) -> bool:
    return name.startswith("mtp." if family == "nemotron_h_mtp" else "model.layers.3.")


def check_frozen(family: str, folder: Path, out: Path) -> None:
    """A step with weight 0, then the export: MTP as in the source bit for bit, shared tensors as they are now."""
    run = build_run(folder / "weights", ep_size=2, mtp_loss_coef=0)
    stats = train_step(run, rank_batches(base(family)))
    assert stats.mtp_loss == 0
    assert {p.requires_grad for name, p in run.model.named_parameters() if is_mtp(name, family)} == {False}
    assert len(stats.expert_counts) == 2  # layers that train
    remove_loss(run.model)
    report = export_on_ranks(run.model, folder / "weights", out)
    assert report.source_keys_left_out == ()
    got, source = read_folder(out), load_file(folder / "weights" / "model.safetensors")
    assert got.keys() == source.keys()
    assert all((got[n].shape, got[n].dtype) == (source[n].shape, source[n].dtype) for n in source)
    assert all(torch.equal(got[name], tensor) for name, tensor in mtp_tensors(family).items())
    moved = [name for name in source if not torch.equal(got[name], source[name])]
    assert "lm_head.weight" in moved
    if family == "deepseek_v3_mtp":
        assert torch.equal(got["model.layers.3.embed_tokens.weight"], got["model.embed_tokens.weight"])
        assert torch.equal(got["model.layers.3.shared_head.head.weight"], got["lm_head.weight"])


def check_trained_export(family: str, folder: Path, out: Path) -> None:
    """With the key left out the blocks train with weight 0.1, and the export holds what they are then."""
    run = build_run(folder / "weights", ep_size=2)
    assert run.mtp_coef == 0.1
    train_step(run, rank_batches(base(family)))
    remove_loss(run.model)
    export_on_ranks(run.model, folder / "weights", out)
    got, parameters = read_folder(out), dict(run.model.named_parameters())
    now = fused({name: tensor for name, tensor in got.items() if name in mtp_tensors(family)})
    for name, before in fused(mtp_tensors(family)).items():
        assert torch.equal(now[name], whole(parameters[name])), name
        assert not torch.equal(now[name], before), name


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_blocks_pass_through_untouched(references, tmp_path, family):
    run_on_ranks(check_frozen, 2, family, references(family), tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_blocks_are_exported_under_their_names(references, tmp_path, family):
    run_on_ranks(check_trained_export, 2, family, references(family), tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # Transformers still loads the folder
    assert torch.equal(plain.lm_head.weight.detach(), read_folder(tmp_path / "out")["lm_head.weight"])


def small_recipe(source: Path, **model: str) -> Recipe:
    return Recipe(
        name="mtp",
        model=Model(source=str(source), **model),
        parallel=Parallel(fsdp_size=2, ep_size=2),
        data=Data(seq_len=SEQ_LEN, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )


def check_bfloat16(family: str, root: Path) -> None:
    recipe = small_recipe(root / "source")
    model = make_model(recipe, read_source(recipe))
    export_on_ranks(model, root / "source", root / "out")
    got, source = read_folder(root / "out"), load_file(root / "source" / "model.safetensors")
    assert got.keys() == source.keys()
    for name in [name for name in source if is_mtp(name, family)]:
        assert got[name].dtype == source[name].dtype, name
        assert torch.equal(got[name], source[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_goes_in_and_out_bit_for_bit(tmp_path, family):
    save_tiny_model(family, tmp_path / "source", dtype=torch.bfloat16)
    run_on_ranks(check_bfloat16, 2, family, tmp_path)


def check_documents(family: str, folder: Path) -> None:
    """Losses of all documents but one; then a token of that one is another: nothing moves, and the other way round."""
    run = build_run(folder / "weights")
    batch = rank_batches(base(family))[0]
    row = int((batch.position_ids == 0).sum(dim=1).argmax())
    starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
    assert len(starts) == 3
    second = slice(starts[1], starts[2])
    others, ids = batch.shift_labels.clone(), batch.input_ids.clone()
    others[row] = ids[row].roll(-1)
    others[row, [start - 1 for start in starts[1:]] + [-1]] = -100
    others[row, second] = -100
    alone = torch.full_like(others, -100)
    alone[row, starts[1] : starts[2] - 1] = ids[row, starts[1] + 1 : starts[2]]

    def losses(labels: torch.Tensor, at: int | None) -> Losses:
        changed = ids.clone()
        if at is not None:
            changed[row, at] = (changed[row, at] + 1) % 256
        run.model.zero_grad()
        found = run.model(input_ids=changed, position_ids=batch.position_ids, shift_labels=labels)
        found.total.backward()
        return found

    before, gradients = losses(others, None), whole_gradients(run.model)
    for at in (starts[1], starts[2] - 1):
        after = losses(others, at)
        assert torch.allclose(after.mtp, before.mtp, rtol=1e-6, atol=0)
        assert worst(whole_gradients(run.model), gradients)[0] < 1e-5
    # Its own loss does move: the test could see it.
    assert abs(float(losses(alone, starts[1]).mtp / losses(alone, None).mtp) - 1) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_no_document_moves_the_loss_of_another(references, family):
    run_on_ranks(check_documents, 1, family, references(family))


def check_whole_logits(family: str, folder: Path) -> None:
    run = build_run(folder / "weights", mtp_loss_coef=COEF)
    batch = rank_batches(base(family))[0]
    fused_loss = batch_loss(run, batch)
    fused_loss.total.backward()
    gradients = whole_gradients(run.model)
    run.model.zero_grad()
    remove_loss(run.model)
    install_loss(run.model, fused=False, chunk_tokens=24, wanted=Wanted(mtp_coef=COEF))
    plain = batch_loss(run, batch)
    plain.total.backward()
    for mine, theirs in zip(fused_loss[:3], plain[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert worst(gradients, whole_gradients(run.model))[0] < TOLERANCE
    run.model.eval()
    with torch.no_grad():
        assert batch_loss(run, batch).mtp is None  # held-out loss is that of the next token alone


def test_whole_logits_give_the_same_loss(references):
    run_on_ranks(check_whole_logits, 1, "nemotron_h_mtp", references("nemotron_h_mtp"))


def check_foreign_copy(folder: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"shared_head.head.weight is not the same as lm_head.weight"):
        build_run(folder)


def test_a_copy_that_is_none_is_named(references, tmp_path):
    source = references("deepseek_v3_mtp") / "weights"
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.shared_head.head.weight"][-1] += 1
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    run_on_ranks(check_foreign_copy, 1, tmp_path)


def check_refusals(root: Path) -> None:
    with pytest.raises(RecipeError, match="has no multi-token-prediction layers; leave the key out"):
        build_run(root / "plain", mtp_loss_coef=0.1)
    for broken, error, words in (
        ("lost", CorruptCheckpointError, "no weights for mtp.layers.1.final_layernorm.weight"),
        ("half", RecipeError, r"layers \[0\], which are not whole blocks of 2"),
    ):
        with pytest.raises(error, match=words):
            build_run(root / broken)


def test_what_does_not_fit_is_named(references, tmp_path):
    source = references("nemotron_h_mtp") / "weights"
    tensors = load_file(source / "model.safetensors")
    kept = {
        "plain": [name for name in tensors if not is_mtp(name, "nemotron_h_mtp")],
        "lost": [name for name in tensors if "final_layernorm" not in name],
        "half": [name for name in tensors if not name.startswith("mtp.layers.1.")],
    }
    for name, keys in kept.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file({key: tensors[key] for key in keys}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    run_on_ranks(check_refusals, 1, tmp_path)


def check_random(family: str, root: Path) -> None:
    """Random weights have the blocks that the config names, the same on every layout."""
    recipe = small_recipe(root, weights="random", dtype="float32")
    model = make_model(recipe, read_source(recipe))
    values = {name: whole(parameter) for name, parameter in model.named_parameters()}
    assert fused(mtp_tensors(family)).keys() <= values.keys()
    assert all(float(tensor.std()) > 0 or tensor.ndim == 1 for tensor in values.values())
    torch.save(values, root / f"values-{torch.distributed.get_rank()}.pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_the_blocks_of_the_config(tmp_path, family):
    tiny_config(family).save_pretrained(tmp_path)
    run_on_ranks(check_random, 2, family, tmp_path)
    first, second = (torch.load(tmp_path / f"values-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
