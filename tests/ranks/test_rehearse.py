"""The rehearsal of a layout without its ranks: who holds what, exact bytes, and faults that it must refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing as mp
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from moe_recipes.config.recipe import Data, Model, Optim, Parallel, Recipe, Train
from moe_recipes.config.resolve import recipe_to_dict
from moe_recipes.models import auto
from moe_recipes.prove import rehearse
from moe_recipes.prove.ownership import Held, ownership_problems
from moe_recipes.runtime.sharding import local_rows, local_tensor
from moe_recipes.train.optim import optimizer_entries
from moe_recipes.train.run import make_model
from tests.ranks.launch import run_on_ranks
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
BEYOND_20_GIB = 20 * 2**20


def recipe_of(source: str, *, ep_size: int, dp_replicate_size: int = 1, num_ranks: int = 8) -> Recipe:
    return Recipe(
        name="tiny",
        model=Model(source=source, weights="random", dtype="bfloat16"),
        parallel=Parallel(
            fsdp_size=num_ranks // dp_replicate_size, ep_size=ep_size, dp_replicate_size=dp_replicate_size
        ),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )


def rehearse_in_a_fork(recipe: Recipe, folder: Path, *words: str, fault: Callable | None = None) -> tuple[int, dict]:
    """Exit code and ``rehearse.json`` of a rehearsal in a process of its own."""

    def child() -> None:
        if fault is not None:
            plain = auto.lay_out_on_meta

            def wrong(*args, **kwargs):
                model, device = plain(*args, **kwargs)
                fault(model)
                return model, device

            auto.lay_out_on_meta = wrong
        sys.argv = ["rehearse", str(folder), "--recipe-json", json.dumps(recipe_to_dict(recipe)), *words]
        os._exit(rehearse.main())

    process = mp.get_context("fork").Process(target=child)
    process.start()
    process.join(200)
    assert process.exitcode is not None
    return process.exitcode, json.loads((folder / "rehearse.json").read_bytes())


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        ("package:tiny_nemotron_h", {"ep_size": 4}),
        ("package:tiny_qwen3_moe", {"ep_size": 2, "dp_replicate_size": 2}),
        ("package:tiny_qwen3_moe", {"ep_size": 3, "num_ranks": 3}),
    ],
)
def test_all_ranks_agree_with_their_meshes(source: str, layout: dict, tmp_path: Path) -> None:
    recipe = recipe_of(source, **layout)
    if layout["ep_size"] == 3:  # 3 ranks: rows that do not divide evenly, and the last rank's part may be empty
        recipe = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, config_overrides={"num_experts": 9})
        )
    code, record = rehearse_in_a_fork(recipe, tmp_path, "--all")
    assert (code, record["verdict"], record["problems"]) == (0, "PASS", [])
    assert [rank["rank"] for rank in record["ranks"]] == list(range(recipe.parallel.num_ranks))
    whole = 0
    for one in record["parameters"]:
        kept = one["name"].endswith((".A_log", ".D", ".dt_bias"))
        assert kept == one["placement"].endswith("(copies), on purpose")
        assert not kept or one["dtype"] == "float32"
        copies = recipe.parallel.num_ranks if kept else recipe.parallel.dp_replicate_size
        whole += copies * math.prod(one["shape"]) * (4 if one["dtype"] == "float32" else 2)
    assert sum(rank["parameter_bytes"] for rank in record["ranks"]) == whole
    for rank in record["ranks"]:
        lines = (tmp_path / "reads" / f"rank-{rank['rank']:05d}.jsonl").read_text().splitlines()
        assert len(lines) == rank["read_slices"] > 10
        assert sum(json.loads(line)["num_bytes"] for line in lines) == rank["read_bytes"]


def check_true_bytes(recipe: Recipe, record: dict) -> None:
    """Against real ranks, with an optimizer that has stepped."""
    from moe_recipes.models.build import read_source
    from moe_recipes.train.optim import build_optimizer

    said = next(rank for rank in record["ranks"] if rank["rank"] == dist.get_rank())
    model = make_model(recipe, read_source(recipe))
    with CommDebugMode() as moved:
        optimizer = build_optimizer(model, recipe.optim)
    assert moved.get_total_counts() == 0  # looking at one row of a shard would gather the tensor from all ranks
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def count(tensors) -> int:
        return sum(local_tensor(tensor).numel() * tensor.element_size() for tensor in tensors)

    assert said["parameter_bytes"] == count(model.parameters())
    assert said["gradient_bytes"] == count(parameter.grad for parameter in model.parameters())
    states = optimizer_entries(model, optimizer, rank=dist.get_rank())
    assert said["optimizer_bytes"] == count(entry.tensor for entry in states.values())


def test_bytes_are_those_of_real_ranks(tmp_path: Path) -> None:
    recipe = recipe_of("package:tiny_nemotron_h", ep_size=2, num_ranks=4)
    code, record = rehearse_in_a_fork(recipe, tmp_path, "--all")
    assert code == 0
    run_on_ranks(check_true_bytes, 4, recipe, record)


def check_slices(folder: Path, recipe: Recipe, reads: Path) -> None:
    """The bytes that the rehearsal would read are those which a real rank's parameters have."""
    from moe_recipes.models.build import read_source

    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights="pretrained"))
    model, rank = make_model(recipe, read_source(recipe)), dist.get_rank()
    raw = (folder / "model.safetensors").read_bytes()
    values = {}
    for line in (reads / f"rank-{rank:05d}.jsonl").read_text().splitlines():
        piece = json.loads(line)
        assert piece["file"] == "model.safetensors"
        data = raw[piece["offset"] : piece["offset"] + piece["num_bytes"]]
        values[piece["key"]] = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert values.keys() <= keys
    name = "model.layers.1.mlp.experts.down_proj"
    rows = local_rows(model.get_parameter(name), rank=rank)
    experts = [key for key in values if key.startswith("model.layers.1.mlp.experts.") and "down_proj" in key]
    assert experts == [
        f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(rows.start, rows.start + rows.count)
    ]
    got = torch.stack([values[key] for key in experts]).view(rows.local_shape)
    assert torch.equal(got, local_tensor(model.get_parameter(name).detach()))
    dense = local_tensor(model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach())
    assert torch.equal(values["model.layers.0.self_attn.q_proj.weight"].view(dense.shape), dense)


def test_slices_of_a_source_are_the_bytes_of_the_shards(tmp_path: Path) -> None:
    save_tiny_model("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16)
    recipe = recipe_of(str(tmp_path / "model"), ep_size=2, num_ranks=4)
    code, record = rehearse_in_a_fork(recipe, tmp_path / "out", "--all")
    assert code == 0, record["problems"]
    assert record["source"].startswith("index of 69 keys, 69 of them")
    run_on_ranks(check_slices, 4, tmp_path / "model", recipe, tmp_path / "out" / "reads")


def head_left_whole(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(torch.empty(model.lm_head.weight.shape, dtype=torch.bfloat16, device="meta"))


def _put(model: nn.Module, placements: list) -> None:
    experts = next(module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate"))
    old = experts.down_proj
    local = torch.empty((2, *old.shape[1:]), dtype=old.dtype, device="meta")
    experts.down_proj = nn.Parameter(DTensor.from_local(local, old.device_mesh, placements, run_check=False))


def experts_copied_over_efsdp(model: nn.Module) -> None:
    _put(model, [Replicate(), Shard(0)])


def experts_cut_inside(model: nn.Module) -> None:
    _put(model, [Replicate(), Shard(1)])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            head_left_whole,
            r"lm_head.weight: replicated by mistake: rows 0:\d+ of \d+ on 8 ranks, not 1: 0, 1, 2, 3, ...",
        ),
        (experts_copied_over_efsdp, "down_proj: owned twice: rows 0:2 of 8 on 2 ranks, not 1: 0, 4"),
        (experts_cut_inside, "down_proj: .*not on dimension 0"),
    ],
)
def test_a_wrong_placement_ends_with_17(fault: Callable, says: str, tmp_path: Path) -> None:
    code, record = rehearse_in_a_fork(recipe_of("package:tiny_nemotron_h", ep_size=4), tmp_path, fault=fault)
    assert (code, record["verdict"]) == (17, "FAIL")
    assert any(re.search(says, problem) for problem in record["problems"]), record["problems"]


def experts_of_pairs(model: nn.Module) -> None:
    """Each two neighbours share all experts among themselves, and know of no other rank."""
    first = dist.get_rank() // 2 * 2
    experts = next(module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate"))
    old = experts.down_proj
    local = torch.empty((4, *old.shape[1:]), dtype=old.dtype, device="meta")
    mesh = DeviceMesh("cpu", [first, first + 1])
    experts.down_proj = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))


def test_ranks_that_no_mesh_so_far_knows_are_built_too(tmp_path: Path) -> None:
    recipe = recipe_of("package:tiny_nemotron_h", ep_size=8)
    code, record = rehearse_in_a_fork(recipe, tmp_path, fault=experts_of_pairs)
    assert code == 17
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1, 7, 2, 4]
    assert [problem.partition(": ")[2] for problem in record["problems"]] == [
        "owned twice: rows 0:4 of 8 on 4 ranks, not 1: 0, 2, 4, 6",
        "owned twice: rows 4:8 of 8 on 4 ranks, not 1: 1, 3, 5, 7",
    ]


def held(*spans: tuple[int, int, int, bool]) -> list[Held]:
    return [Held(rank=rank, start=start, end=end, primary=primary) for rank, start, end, primary in spans]


def test_rows_without_an_owner_and_rows_with_two() -> None:
    assert ownership_problems(4, held((0, 0, 2, True), (1, 2, 4, True), (2, 4, 4, True)), replicas=1) == []
    assert ownership_problems(4, held((0, 0, 2, True), (1, 3, 4, True)), replicas=1) == [
        "unowned: no rank holds rows 2:3 of 4"
    ]
    assert "owned twice: rows 1:2 of 4" in ownership_problems(4, held((0, 0, 2, True), (1, 1, 4, True)), replicas=1)[0]
    two = held((0, 0, 4, True), (1, 0, 4, True))
    assert ownership_problems(4, two, replicas=1)[0].startswith("replicated by mistake")
    assert ownership_problems(4, two, replicas=2) == ["owned twice: rows 0:4 of 4 has 2 primary holders 0, 1"]
    assert ownership_problems(4, held((0, 0, 4, True)), replicas=2) == ["unowned: rows 0:4 of 4 on 1 ranks, not 2"]


@pytest.mark.slow
def test_the_true_ultra_on_sampled_ranks_of_128(tmp_path: Path) -> None:
    start = time.monotonic()
    words = [sys.executable, "-m", "moe_recipes.launch.cli", "rehearse", "nemotron_ultra_550b"]
    done = subprocess.run(
        [*words, "--set", f"run_dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 600
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < BEYOND_20_GIB
    record = json.loads((tmp_path / "run-rehearsal" / "rehearse.json").read_bytes())
    assert record["num_parameters"] >= 549_308_968_960
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1, 64, 127]
    experts = [one for one in record["parameters"] if ".experts." in one["name"]]
    assert len(experts) >= 96
    assert {(one["placement"], *one["rows_a_rank"]) for one in experts} == {("efsdp 2 x ep 64", 4, 4)}
    for rank in record["ranks"]:
        reads = (tmp_path / "run-rehearsal" / "reads" / f"rank-{rank['rank']:05d}.jsonl").read_text().splitlines()
        experts = [json.loads(line) for line in reads if ".experts." in line]
        assert len({piece["key"] for piece in experts}) >= 48 * 4 * 2
        # lean_adamw: 2 bytes of weight and of gradient, 4.06 of optimizer state
        assert 7.9 < rank["parameter_bytes"] / 2**30 < 9
        assert 2.0 < rank["optimizer_bytes"] / rank["parameter_bytes"] < 2.1
