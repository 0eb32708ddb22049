"""Every rank reads its part of a pretrained folder, bit for bit; a folder that does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_recipes.config.errors import EXIT_CORRUPT_CHECKPOINT, CorruptCheckpointError, OtherRankError, RecipeError
from moe_recipes.config.recipe import Data, Model, Optim, Parallel, Recipe, Train
from moe_recipes.models.build import build_model, load_config, read_source
from moe_recipes.models.loading import load
from moe_recipes.models.loading.load import report_of
from moe_recipes.runtime.sharding import local_rows, local_tensor
from tests.ranks.launch import run_on_ranks
from tests.ranks.test_mtp import fused
from tests.small_configs import small
from tests.tiny_models import mtp_tensors, save_tiny_model

LAYOUTS = [
    ("qwen3_moe", 1, 1, 1),
    ("qwen3_moe", 2, 2, 1),
    ("qwen3_moe", 4, 2, 1),
    ("deepseek_v3_mtp", 4, 4, 1),
    ("deepseek_v3_mtp", 4, 2, 2),
    ("nemotron_h_mtp", 2, 2, 1),
    ("nemotron_h_mtp", 4, 2, 1),
    ("nemotron_h", 3, 1, 1),
    ("gpt_oss", 4, 2, 1),
    ("llama_tied", 2, 1, 1),
]
"""Family, ranks, ``ep_size``, ``dp_replicate_size``: whole experts, cut experts, replicas, rows that do not divide."""


def check_equal(folder: Path, family: str, ep_size: int, replicas: int, dtype: torch.dtype) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parallel = Parallel(fsdp_size=num_ranks // replicas, ep_size=ep_size, dp_replicate_size=replicas)
    recipe = dataclasses.replace(recipe_of(folder, ep_size), parallel=parallel)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, dtype=str(dtype)[6:], attn_implementation="eager")
    )
    model = build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{rank}")
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    want = {**dict(whole.named_parameters(remove_duplicate=False)), **dict(whole.named_buffers())}
    if family == "nemotron_h_mtp" or family == "nemotron_h":
        # The package keeps them in float32, so that what the file says is what they are.
        kept = {f"backbone.{n.removeprefix('model.')}": n for n in want if n.endswith((".A_log", ".D", ".dt_bias"))}
        assert len(kept) == 6
        want |= {name: stored[key] for key, name in kept.items()}
    have = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    if family.endswith("_mtp"):
        tensors = mtp_tensors(family, dtype=torch.float32)
        extra = fused(tensors) | {name: t for name, t in tensors.items() if name.endswith("correction_bias")}
        want |= {name: tensor.to(have[name].dtype) for name, tensor in extra.items()}
        assert {have[name].dtype for name in extra if ".gate." not in name} == {dtype}
    assert have.keys() == want.keys()
    for name, tensor in have.items():
        rows, local = local_rows(tensor, rank=rank), local_tensor(tensor).detach()
        part = want[name][rows.start : rows.start + rows.count] if rows.shape else want[name]
        assert (local.dtype, local.device.type) == (part.dtype, "cpu"), name
        assert torch.equal(local, part), name
    report = report_of(model)
    assert report is not None
    assert report.bytes_read_min <= report.bytes_read_max <= sum(t.nbytes for t in stored.values())
    if num_ranks > replicas:  # a rank that read all would have read this much
        assert report.bytes_read_max < 0.75 * sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("family", "num_ranks", "ep_size", "replicas"), LAYOUTS)
def test_every_rank_gets_its_part_of_what_transformers_loads(
    tmp_path: Path, family: str, num_ranks: int, ep_size: int, replicas: int, dtype: torch.dtype
) -> None:
    """All parameters and buffers, also those that no file holds; the source is float32, random values everywhere."""
    run_on_ranks(save_tiny_model, 1, family, tmp_path)
    run_on_ranks(check_equal, num_ranks, tmp_path, family, ep_size, replicas, dtype)


def check_progress(folder: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_recipes").addHandler(handler)
    logging.getLogger("moe_recipes").setLevel(logging.INFO)
    load.PROGRESS_S = 0.0
    recipe = recipe_of(folder, 2)
    build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    told = [line for line in lines if line.startswith("weights: ")]
    if dist.get_rank() != 0:
        assert told == []
        return
    assert len(told) > 20
    assert all(re.fullmatch(r"weights: \d+\.\d\d GB read in \d+ s", line) for line in told[:-1])
    last = r"weights: \S+ GB a rank \(least \S+\) of 1 files in \d+\.\d s, \S+ GB/s over all ranks"
    assert re.fullmatch(last, told[-1])


def test_rank_0_tells_how_far_it_is_and_what_was_read(tmp_path: Path) -> None:
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    run_on_ranks(check_progress, 2, tmp_path)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.6."


def recipe_of(folder: Path, ep_size: int) -> Recipe:
    return Recipe(
        name="weights",
        model=Model(source=str(folder), dtype="float32"),
        parallel=Parallel(fsdp_size=2, ep_size=ep_size),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )


def check_refusal(folder: Path, ep_size: int, message: str) -> None:
    recipe = recipe_of(folder, ep_size)
    with pytest.raises((CorruptCheckpointError, OtherRankError), match=message) as caught:
        build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == EXIT_CORRUPT_CHECKPOINT
    assert "\n" not in str(caught.value)


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefix)}


DAMAGE = {
    "dense": (
        without(Q_PROJ),
        rf"no weights for {Q_PROJ} \(1 of its keys, 1 tensors of the model are missing\); fetch",
    ),
    "layer of experts": (without("model.layers.1.mlp.experts."), r"no weights for model\.layers\.1\.mlp\.experts\."),
    "one expert": (
        without(EXPERT),
        rf"no weights for {EXPERT}gate_proj.weight \(3 of its keys, 2 tensors of the model",
    ),
    "whole number": (
        lambda tensors: tensors | {Q_PROJ: torch.zeros(64, 64, dtype=torch.int32)},
        f"model.safetensors: {Q_PROJ} is int32, which cannot become float32",
    ),
    "codes": (
        lambda tensors: tensors | {Q_PROJ: torch.zeros(64, 64).to(torch.float8_e4m3fn)},
        f"{Q_PROJ} is float8_e4m3fn, which cannot become float32: its config.json has no quantization_config",
    ),
    "another layer": (
        lambda tensors: tensors | {Q_PROJ.replace(".0.", ".2."): torch.zeros(64, 64)},
        r"model\.layers\.2\.self_attn\.q_proj\.weight \(1 such tensors\) is of a layer or expert that config.json does",
    ),
    "more experts": (
        lambda tensors: tensors | {EXPERT.replace(".6.", ".8.") + "up_proj.weight": torch.zeros(48, 64)},
        r"experts\.8\.up_proj\.weight \(1 such tensors\) is of a layer or expert that config.json does not have",
    ),
    "another family": (
        lambda tensors: {name.replace("model.", "transformer.h."): value for name, value in tensors.items()},
        r"no weights for .* are missing\); these are not the weights of a qwen3_moe; fetch the model again",
    ),
    "shape": (lambda tensors: tensors | {Q_PROJ: torch.zeros(48, 64)}, f"{Q_PROJ} has another shape"),
    "expert's shape": (
        lambda tensors: tensors | {f"{EXPERT}up_proj.weight": torch.zeros(7, 64)},
        rf"model.safetensors: {EXPERT}up_proj.weight has another shape than in the model: \[7, 64\], not \[48, 64\]",
    ),
}


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_all_ranks_refuse_weights_that_are_not_the_models(tmp_path: Path, ep_size: int, damage: str) -> None:
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    change, message = DAMAGE[damage]
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    run_on_ranks(check_refusal, 2, tmp_path, ep_size, message)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ \(\d+ such tensors\) is of a layer or expert"),
        ({"num_hidden_layers": 3}, r"no weights for model\.layers\.2\.\S+ "),
        ({"num_local_experts": 4}, r"experts\.4\.\S+ \(\d+ such tensors\) is of a layer or expert"),
        ({"num_local_experts": 16}, r"no weights for model\.layers\.0\.mlp\.experts\.8\."),
        ({"hidden_size": 128}, r"has another shape than in the model: \["),
    ],
)
def test_a_config_of_another_size_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    change_config(tmp_path, **changes)
    run_on_ranks(check_refusal, 2, tmp_path, 2, message)


def check_tied(folder: Path, want: torch.Tensor) -> None:
    recipe = recipe_of(folder, 1)
    model = build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight.full_tensor(), want)


def test_tied_weights_may_stand_under_either_name_or_under_both_alike(tmp_path: Path) -> None:
    run_on_ranks(save_tiny_model, 1, "llama_tied", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": table}, file, metadata={"format": "pt"})
    run_on_ranks(check_tied, 2, tmp_path, table)
    both = {"lm_head.weight": table, "model.embed_tokens.weight": table.clone()}
    save_file(tensors | both, file, metadata={"format": "pt"})
    run_on_ranks(check_tied, 2, tmp_path, table)
    both["lm_head.weight"] = table.clone()
    both["lm_head.weight"][100, 3] += 1
    save_file(tensors | both, file, metadata={"format": "pt"})
    message = "lm_head.weight is not the same as model.embed_tokens.weight, which config.json ties to it; fetch"
    run_on_ranks(check_refusal, 2, tmp_path, 1, message)


def save_small(model_type: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(model_type), dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder)


@pytest.mark.parametrize(("model_type", "by_transformers"), [("kimi_linear", False), ("sarvam_moe", True)])
def test_a_conversion_that_mixes_rows_goes_through_that_of_transformers(
    tmp_path: Path, model_type: str, by_transformers: bool
) -> None:
    """Kimi's convolutions of q, k and v become one; Sarvam's one tensor becomes q, k and v."""
    run_on_ranks(save_small, 1, model_type, tmp_path)
    run_on_ranks(check_mixed, 2, tmp_path, by_transformers)


def check_mixed(folder: Path, by_transformers: bool) -> None:
    recipe = recipe_of(folder, 2)
    model = build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    assert (report_of(model) is None) == by_transformers
    want = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state = model.state_dict()
    assert state.keys() == want.keys()
    for name, tensor in state.items():
        rows = local_rows(tensor, rank=dist.get_rank())
        assert torch.equal(local_tensor(tensor), want[name][rows.start : rows.start + rows.count]), name


@pytest.mark.parametrize("code", [{}, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}])
def test_a_family_that_transformers_does_not_know_is_refused_and_no_code_is_run(tmp_path: Path, code: dict) -> None:
    run_on_ranks(save_tiny_model, 1, "llama_tied", tmp_path)
    change_config(tmp_path, model_type="unheard_of", **code)
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('this code must not run')")
    recipe = recipe_of(tmp_path, 1)
    told = "the code that the model brings along .auto_map. is not run; take" if code else "; take a model of a known"
    with pytest.raises(RecipeError, match=rf"config.json: model_type 'unheard_of' is not in Transformers .*{told}"):
        load_config(read_source(recipe), tmp_path / "scratch")


def check_dispatcher_refusal(folder: Path, name: str) -> None:
    recipe = recipe_of(folder, 2)
    parallel = dataclasses.replace(recipe.parallel, ep_implementation=name)
    with pytest.raises(RecipeError, match=f"^parallel.ep_implementation={name}: .*; leave the key out$"):
        build_model(
            dataclasses.replace(recipe, parallel=parallel),
            read_source(recipe),
            scratch=folder / f"scratch-{dist.get_rank()}",
        )


@pytest.mark.parametrize("name", ["all_to_al", "all_reduce"])
def test_a_dispatcher_that_cannot_serve_is_the_recipes_error(tmp_path: Path, name: str) -> None:
    run_on_ranks(save_tiny_model, 1, "qwen3_moe", tmp_path)
    run_on_ranks(check_dispatcher_refusal, 2, tmp_path, name)
