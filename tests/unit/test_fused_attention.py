"""Attention with documents, windows, sinks and narrow values: every gradient in float64, and Transformers' models."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import PreTrainedModel, masking_utils

from moe_recipes import AutoModelForCausalLM
from moe_recipes.kernels.attention import Mask, allowed, attention, attention_reference
from moe_recipes.models import attention as door
from moe_recipes.models.auto import enable_activation_checkpointing
from moe_recipes.models.packing import borders_found_on_the_host
from moe_recipes.models.time_step import honour_time_step_limit
from tests.ranks.parity import boost
from tests.tiny_models import tiny_config

FAMILIES = ("gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_moe")
LENGTHS = ((13, 27), (5, 30, 5))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
IDS = torch.arange(80).mul(37).remainder(256).view(2, 40)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("borders", [None, [0, 7, 8, 23, 30, 46]])
@pytest.mark.parametrize("window", [None, 5, 400])
@pytest.mark.parametrize(("heads", "groups", "width", "narrow"), [(4, 2, 16, 16), (4, 4, 24, 16)])
def test_output_and_every_gradient(heads, groups, width, narrow, window, borders, sinks) -> None:
    torch.manual_seed(0)
    shapes = [(2, 23, heads, width), (2, 23, groups, width), (2, 23, groups, narrow), *[(heads,)] * sinks]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = Mask(scale=0.3, window=window, borders=None if borders is None else torch.tensor(borders, dtype=torch.int32))
    sink = leaves[3] if sinks else None
    found = attention(*leaves[:3], mask=mask, sinks_H=sink)
    seen = allowed(mask, rows=2, length=23, device=found.device)
    wanted = attention_reference(*leaves[:3], sink, seen, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    grad = torch.randn_like(found)
    pairs = zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """This package's with its attention, and Transformers' own with eager attention and experts; the same weights."""
    torch.manual_seed(0)
    config = tiny_config(family)
    plain = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    boost(plain)
    honour_time_step_limit(plain)
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=door.NAME)
    ours.load_state_dict(plain.state_dict())
    return ours.train(), plain.train()


def alone(model: PreTrainedModel) -> torch.Tensor:
    """Logits of each document in a row of its own."""
    rows = [
        torch.cat([model(input_ids=part[None], use_cache=False).logits for part in row.split(lengths)], dim=1)
        for row, lengths in zip(IDS, LENGTHS, strict=True)
    ]
    return torch.cat(rows)


def same_gradients(ours: PreTrainedModel, plain: PreTrainedModel, *logits: torch.Tensor) -> None:
    torch.testing.assert_close(*logits, rtol=0, atol=5e-5)
    grad = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(1))
    for each in logits:
        each.backward(grad)
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert float((mine.grad - theirs.grad).norm()) <= 5e-5 * float(theirs.grad.norm()) + 1e-9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_models_equal_eager(family: str) -> None:
    ours, plain = models(family)
    same_gradients(*(pair := (ours, plain)), *(model(input_ids=IDS, use_cache=False).logits for model in pair))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_eager_on_each_alone(family: str, on_host: bool) -> None:
    """Also with recomputation, which runs after the batch's borders are gone from the host."""
    ours, plain = models(family)
    enable_activation_checkpointing(ours)
    inputs = {"input_ids": IDS, "position_ids": POSITIONS.clone(), "use_cache": False}
    if on_host:
        with borders_found_on_the_host(POSITIONS, IDS.device):
            found = ours(**inputs).logits
    else:
        found = ours(**inputs).logits
    same_gradients(ours, plain, found, alone(plain))


@pytest.mark.parametrize("inference", [False, True])
def test_position_ids_written_anew_are_other_documents(inference: bool) -> None:
    """One tensor for every batch, as in a loop that allocates nothing; then the same tensor for one row of two."""
    ours, plain = models("qwen3_moe")
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        positions = POSITIONS[:1].clone()
        for row, rows in ((0, 1), (1, 1), (1, 2)):
            positions.copy_(POSITIONS[row : row + 1])
            ids = IDS[:rows]
            found, wanted = (m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (ours, plain))
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)


def test_no_mask_is_made_for_documents_and_windows(monkeypatch) -> None:
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: pytest.fail("a mask of S x S"))
    ours, _ = models("gpt_oss")
    ours(input_ids=IDS, position_ids=POSITIONS, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_a_cache_go_another_way(family: str) -> None:
    ours, plain = models(family)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    with torch.no_grad():
        found, wanted = (model(input_ids=IDS, attention_mask=mask, use_cache=False).logits for model in (ours, plain))
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=5e-5)
    if family == "nemotron_h":
        return  # the boosted scan overflows in a step by step recurrence
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found, wanted = (model.eval().generate(IDS[:1, :20], **options) for model in (ours, plain))
    assert torch.equal(found, wanted)


def test_gpt_oss_gets_it_unless_eager_is_asked_for() -> None:
    for asked, used in ((None, door.NAME), ("sdpa", door.NAME), ("eager", "eager")):
        options = {} if asked is None else {"attn_implementation": asked}
        model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss"), **options)
        assert model.config._attn_implementation == used


def test_a_folder_of_gpt_oss_gets_it_too(tmp_path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("gpt_oss")).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == door.NAME


def test_families_whose_layers_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^attn_implementation moe_recipes knows deepseek_v3, .*, and not 'llama'$"):
        AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation=door.NAME)
