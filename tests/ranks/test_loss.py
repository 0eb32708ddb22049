"""Which models get the fused loss, and that the trainer's loss is Transformers' own where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import CohereConfig, Gemma2Config, GraniteConfig, PreTrainedConfig

from moe_recipes.models.loss import why_not_fused
from moe_recipes.train.loop import batch_loss
from tests.ranks.launch import run_on_ranks
from tests.ranks.parity import boost, build_run, rank_batches, whole_gradients, worst
from tests.tiny_models import tiny_config

COMMON = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
UNUSUAL = {
    "gemma2": (Gemma2Config(**COMMON, head_dim=16, final_logit_softcapping=5.0), "logits = logits / self.config.final"),
    "granite": (GraniteConfig(**COMMON, logits_scaling=4.0), "logits = logits / self.config.logits_scaling"),
    "cohere": (CohereConfig(**COMMON, logit_scale=0.25), "logits = logits * self.logit_scale"),
}
FUSED = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "llama", "llama_tied")


def on_meta(config: PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FUSED)
def test_plain_output_projections_are_fused(family):
    assert why_not_fused(on_meta(tiny_config(family))) is None


@pytest.mark.parametrize("family", UNUSUAL)
def test_scaled_and_capped_logits_are_not_fused(family):
    config, reason = UNUSUAL[family]
    assert reason in why_not_fused(on_meta(config))


def save_unusual(family: str, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(UNUSUAL[family][0], dtype=torch.float32)
    boost(model)
    model.save_pretrained(folder)


def check_loss_of_whole_logits(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    run = build_run(folder)
    assert not next(o for o in run.optimizations if o.name == "fused linear cross-entropy").applied
    for batch in rank_batches("qwen3_moe"):
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        labels = batch.shift_labels
        own = model(**inputs, labels=labels, shift_labels=labels, num_items_in_batch=1).loss
        logits = model(**inputs).logits
        summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        assert float(summed) == pytest.approx(float(own))  # that is what the arguments above ask of Transformers
        loss = batch_loss(run, batch).total
        assert float(loss) == pytest.approx(float(own), rel=1e-6)
        own.backward()
        loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst(whole_gradients(run.model), wanted)[0] <= 1e-5


@pytest.mark.parametrize("family", UNUSUAL)
def test_loss_of_models_that_are_not_fused_is_transformers_own(tmp_path, family):
    run_on_ranks(save_unusual, 1, family, tmp_path / "model")
    run_on_ranks(check_loss_of_whole_logits, 1, tmp_path / "model")
