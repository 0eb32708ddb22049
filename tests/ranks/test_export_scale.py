"""A model of Nemotron 3 Ultra's 108 layers and 49,152 expert tensors, all tiny, from 16 ranks to other layouts.

The weights are drawn alike on any layout, so one process has the values that every layout must load again.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import NemotronHConfig
from transformers.distributed import DistributedConfig

from moe_recipes.config.recipe import Data, Model, Optim, Parallel, Recipe, Train
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.build import build_model, read_source
from moe_recipes.models.exporting.export import export_model
from moe_recipes.prove import ranks
from moe_recipes.runtime.sharding import local_rows, local_tensor
from tests.ranks.launch import run_on_ranks

ULTRA = Path(__file__).parents[2] / "moe_recipes/models/configs/nemotron_3_ultra_550b/config.json"
TINY = {
    "vocab_size": 128, "hidden_size": 16, "moe_latent_size": 8, "moe_intermediate_size": 8, "intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "num_nextn_predict_layers": 0,
}  # fmt: skip
SEED = 11
MAX_GIB_A_RANK = 2.0
"""Resident memory of one of the 16 ranks, most of which is the program, which they share."""


def agree(ok: bool) -> bool:
    votes = torch.tensor([int(ok)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def config() -> NemotronHConfig:
    return NemotronHConfig(**{**json.loads(ULTRA.read_text()), **TINY})


def draw(**layout: int) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        config(), distributed_config=DistributedConfig(**layout), seed=SEED, dtype=torch.bfloat16
    )


def write_export(out: Path) -> None:
    model = draw(fsdp_size=16, ep_size=8)
    down = model.model.layers[1].mixer.experts.down_proj
    assert [placement.dim for placement in down.placements] == [0, 0]
    assert local_tensor(down).shape[0] == 512 // 16
    scratch = out.with_name(f"config-{dist.get_rank()}")
    config().save_pretrained(scratch)
    export_model(
        model, out, source_dir=None, config_json=(scratch / "config.json").read_bytes(), tokenizer_dir=None,
        rank=dist.get_rank(), num_ranks=16, barrier=dist.barrier, agree=agree,
    )  # fmt: skip
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak_gib < MAX_GIB_A_RANK, peak_gib
    (out.parent / f"peak-{dist.get_rank()}").write_text(f"{peak_gib:.2f}")


def assert_equals_drawn(model: torch.nn.Module) -> None:
    """This rank's part of every tensor is that of the model as one process draws it."""
    want, got = draw().state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        rows = local_rows(tensor, rank=0)
        part = want[name][rows.start : rows.start + rows.count] if want[name].ndim else want[name]
        assert torch.equal(local_tensor(tensor), part.to(tensor.dtype)), name


def load_plainly(out: Path, layout: dict[str, int]) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.bfloat16,
        output_loading_info=True,
        **({"distributed_config": DistributedConfig(**layout)} if layout else {}),
    )
    assert not any(info.values()), info
    assert any(isinstance(tensor, DTensor) for tensor in model.parameters()) == bool(layout)
    assert_equals_drawn(model)


def load_as_the_trainer(out: Path, layout: dict[str, int]) -> None:
    recipe = Recipe(
        name="scale",
        model=Model(source=str(out), dtype="bfloat16"),
        parallel=Parallel(**layout),
        data=Data(format="random_tokens", seq_len=16),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )
    model = build_model(recipe, read_source(recipe), scratch=out.with_name(f"scratch-{dist.get_rank()}"))
    assert_equals_drawn(model)


@pytest.mark.slow
def test_a_model_of_49152_expert_tensors_leaves_16_ranks_and_loads_on_other_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_S", 900)  # 16 ranks on two cores that others use too
    out = tmp_path / "export"
    run_on_ranks(write_export, 16, out)
    record = json.loads((out / "EXPORT.json").read_text())
    assert record["distinct_experts"] == 48 * 512
    keys = Counter(".experts." in key for key in record["tensors"])
    assert keys[True] == 49_152
    assert record["read_back"] is True
    run_on_ranks(load_plainly, 1, out, {})
    run_on_ranks(load_plainly, 4, out, {"fsdp_size": 4, "ep_size": 2})
    run_on_ranks(load_as_the_trainer, 2, out, {"fsdp_size": 2, "ep_size": 2})
