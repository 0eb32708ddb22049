"""Documents that share a row never see each other, or the recipe is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from moe_recipes import AutoModelForCausalLM
from moe_recipes.config.errors import RecipeError
from moe_recipes.config.recipe import Data, Model, Optim, Recipe, Train
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.packing import why_not_packed
from moe_recipes.runtime.world import World
from moe_recipes.train.run import setup
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import EAGER_ATTENTION, boost
from tests.ranks.test_loss import UNUSUAL
from tests.tiny_models import tiny_config
from tests.unit.data_tools import chat, make_tokenizer, write_jsonl

APART = ("qwen3_moe", "deepseek_v3", "llama", "gemma2", "granite", "cohere")
TOGETHER = {
    "gpt_oss": "makes its attention mask without position ids",
    "nemotron_h": "carries state from one document of a row to the next (NemotronHMamba2Mixer)",
}


def influence_of_the_first_document(model: transformers.PreTrainedModel) -> float:
    """Largest gradient of the second document's logits by the first one's embeddings; 0 is no influence."""
    torch.manual_seed(0)
    embeddings = torch.randn(1, 16, model.config.hidden_size, requires_grad=True)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    logits = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, 7:].sum(), embeddings)
    assert gradient[0, 7:].abs().max() > 0
    return float(gradient[0, :7].abs().max())


def check_family(family: str) -> None:
    config = UNUSUAL[family][0] if family in UNUSUAL else tiny_config(family)
    attention = "eager" if family in EAGER_ATTENTION else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    boost(model)
    reason = why_not_packed(model)
    if family in APART:
        assert influence_of_the_first_document(model) == 0.0
        assert reason is None
    else:
        assert influence_of_the_first_document(model) > 0.1
        assert TOGETHER[family] in reason


def check_ours(family: str) -> None:
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(tiny_config(family), **options)
    boost(model)
    assert why_not_packed(model) is None
    assert influence_of_the_first_document(model) == 0.0
    # Each half alone is not enough.
    base = model.base_model
    base.__class__ = type(base).__mro__[1]
    assert TOGETHER[family] in why_not_packed(model) or "Mamba2Mixer" in why_not_packed(model)
    assert influence_of_the_first_document(model) > 0.1


@pytest.mark.parametrize("family", TOGETHER)
def test_documents_stay_apart_in_what_this_package_builds(family):
    run_on_ranks(check_ours, 1, family)


@pytest.mark.parametrize("family", [*APART, *TOGETHER])
def test_the_verdict_is_what_gradients_show(family):
    run_on_ranks(check_family, 1, family)


def check_refusal(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder / "model")
    config = transformers.Lfm2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    config.save_pretrained(folder / "model")
    write_jsonl(folder / "a.jsonl", [chat(f"the cat {i}?", "sat on the mat") for i in range(12)])
    recipe = Recipe(
        name="packed",
        model=Model(source=str(folder / "model"), weights="random", dtype="float32"),
        data=Data(train=(str(folder / "a.jsonl"),), seq_len=64, cache_dir=str(folder / "cache")),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )
    run_folder = RunFolder(folder / "run")
    run_folder.path.mkdir()
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"), host="test")
    with pytest.raises(RecipeError, match=r"data\.packing=true: .*Lfm2ShortConv.*; set data\.packing: false"):
        setup(recipe, run_folder, world)
    apart = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packing=False))
    assert setup(apart, run_folder, world).batches.num_rows == 12


def test_packing_is_refused_where_documents_would_mix(tmp_path):
    run_on_ranks(check_refusal, 1, tmp_path)
