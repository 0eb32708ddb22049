"""Checkpoints of real FSDP2 and expert-parallel parameters: saved on some ranks, loaded on others."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moe_recipes.checkpoint.store import Entry, latest_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from moe_recipes.config.errors import CannotWriteError, InfrastructureError, MoeRecipesError, RecipeError
from moe_recipes.runtime.sharding import local_rows, local_tensor
from tests.ranks.launch import run_on_ranks

DENSE = {"embed": (7, 5), "norm": (3,), "head": (16, 4)}
"""Over 4 ranks: 7 rows are uneven, and of 3 rows the last rank holds none."""

EXPERTS = {"gate_up": (6, 4, 3), "down": (6, 3, 2)}
"""Over ep=2 and efsdp=2 each pair of ranks splits 3 experts into 2 and 1."""

LAYOUTS = [
    # ranks, replicate, efsdp, ep
    (4, 1, 2, 2),
    (4, 1, 4, 1),
    (4, 2, 1, 2),
    (4, 2, 2, 1),
    (3, 1, 1, 3),
    (2, 1, 1, 2),
    (2, 1, 2, 1),
    (2, 2, 1, 1),
    (1, 1, 1, 1),
]


def global_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in {**DENSE, **EXPERTS}.items()}


class Holder(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(parameter))


@functools.cache
def meshes(replicate, efsdp, ep):
    """Of this process; making the groups of a mesh is most of the time of a small load."""
    dense = init_device_mesh("cpu", (replicate, efsdp * ep), mesh_dim_names=("dp_replicate", "fsdp"))
    return dense, init_device_mesh("cpu", (replicate, efsdp, ep), mesh_dim_names=("dp_replicate", "efsdp", "ep"))


def build(values, replicate, efsdp, ep) -> dict[str, torch.nn.Parameter]:
    """Parameters as Transformers lays them out: experts over ``ep``, then FSDP over ``efsdp``; dense over ``fsdp``."""
    dense_mesh, expert_mesh = meshes(replicate, efsdp, ep)
    dense = Holder({name: values[name].clone() for name in DENSE})
    ep_mesh = expert_mesh["ep"]
    if ep > 1:
        experts = Holder({name: distribute_tensor(values[name], ep_mesh, [Shard(0)]) for name in EXPERTS})
    else:
        experts = Holder({name: values[name].clone() for name in EXPERTS})
    fully_shard(dense, mesh=dense_mesh if replicate > 1 else dense_mesh["fsdp"])
    fully_shard(experts, mesh=expert_mesh["dp_replicate", "efsdp"] if replicate > 1 else expert_mesh["efsdp"])
    return {**dict(dense.named_parameters()), **dict(experts.named_parameters())}


def one_adamw_step(parameters) -> dict[str, torch.Tensor]:
    """Parameters and first moments after a step whose gradient is the parameter itself: elementwise, so exact."""
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.1, foreach=False)
    for parameter in parameters.values():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    moments = {f"optim.exp_avg.{name}": optimizer.state[p]["exp_avg"] for name, p in parameters.items()}
    return {**{f"model.{name}": p.detach() for name, p in parameters.items()}, **moments}


def as_entries(tensors) -> dict[str, Entry]:
    rank = dist.get_rank()
    return {name: Entry(tensor=local_tensor(t), rows=local_rows(t, rank=rank)) for name, t in tensors.items()}


def group() -> dict:
    def agree(flag: bool) -> bool:
        all_true = torch.tensor(int(flag))
        dist.all_reduce(all_true, op=dist.ReduceOp.MIN)
        return bool(all_true)

    return {"rank": dist.get_rank(), "num_ranks": dist.get_world_size(), "barrier": dist.barrier, "agree": agree}


def save(folder: Path, step: int, entries) -> Path:
    own = {"rng": torch.full((4,), dist.get_rank(), dtype=torch.uint8)}
    return save_checkpoint(
        folder, step, entries=entries, rank_tensors=own, state={"step": step}, identity={"model": "m"}, **group()
    )


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_layout(folder: Path, layout) -> None:
    tensors = one_adamw_step(build(global_values(), *layout))
    tensors["model.bias"] = torch.arange(5)
    path = save(folder, 1, as_entries(tensors))
    assert path == folder / "step-00000001"


def load_layouts(folder: Path, layouts, num_saved: int) -> None:
    for layout in layouts:
        load_layout(folder, layout, num_saved)


def load_layout(folder: Path, layout, num_saved: int) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    wrong = {name: torch.full_like(value, 9.0) for name, value in global_values().items()}
    tensors = one_adamw_step(build(wrong, *layout))
    tensors["model.bias"] = torch.zeros(5, dtype=torch.int64)
    own = {"rng": torch.full((4,), 99, dtype=torch.uint8)}
    state = load_checkpoint(
        folder / "step-00000001",
        entries=as_entries(tensors),
        rank_tensors=own,
        identity={"model": "m"},
        rank=rank,
        num_ranks=ranks,
    )
    assert state == {"step": 1, "rank_tensors_loaded": ranks == num_saved}
    assert own["rng"].tolist() == [rank if ranks == num_saved else 99] * 4
    expected = one_adamw_step({name: torch.nn.Parameter(value) for name, value in global_values().items()})
    expected["model.bias"] = torch.arange(5)
    for name, tensor in tensors.items():
        torch.testing.assert_close(whole_tensor(tensor), expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (LAYOUTS[0], LAYOUTS),
        (LAYOUTS[2], [LAYOUTS[0], LAYOUTS[6], LAYOUTS[8]]),
        (LAYOUTS[8], [LAYOUTS[0], LAYOUTS[5]]),
    ],
)
def test_loads_at_any_layout_and_rank_count(tmp_path, saved, loaded):
    run_on_ranks(save_layout, saved[0], tmp_path, saved[1:])
    assert verify_checkpoint(tmp_path / "step-00000001", hashes=True) == []
    for ranks in sorted({layout[0] for layout in loaded}):
        layouts = [layout[1:] for layout in loaded if layout[0] == ranks]
        run_on_ranks(load_layouts, ranks, tmp_path, layouts, saved[0])


ALL_LAYOUTS = [
    (replicate * efsdp * ep, replicate, efsdp, ep) for ep in (1, 2, 4) for efsdp in (1, 2) for replicate in (1, 2)
]
"""ep x efsdp x replicas, up to 16 ranks."""


def save_layouts(folder: Path, layouts) -> None:
    for layout in layouts:
        save_layout(folder / str(layout), layout)


def load_each(folder: Path, layouts) -> None:
    for num_saved, *saved in ALL_LAYOUTS:
        load_layouts(folder / str(tuple(saved)), layouts, num_saved)


@pytest.mark.slow
def test_every_layout_loads_what_every_other_saved(tmp_path):
    by_ranks = {n: [layout[1:] for layout in ALL_LAYOUTS if layout[0] == n] for n in (1, 2, 4, 8, 16)}
    assert sum(map(len, by_ranks.values())) == len(ALL_LAYOUTS) == 12
    for ranks, layouts in by_ranks.items():
        run_on_ranks(save_layouts, ranks, tmp_path, layouts)
    for _, *saved in ALL_LAYOUTS:
        assert verify_checkpoint(tmp_path / str(tuple(saved)) / "step-00000001", hashes=True) == []
    for ranks, layouts in by_ranks.items():
        run_on_ranks(load_each, ranks, tmp_path, layouts)


def local_entry(rows_a_rank: int, opaque: bool = False) -> dict[str, Entry]:
    from moe_recipes.runtime.sharding import Rows

    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = Rows(start=rank * rows_a_rank, count=rows_a_rank, shape=(rows_a_rank * ranks, 2), primary=True)
    shape = (rows_a_rank * 3 + 1,) if opaque else (rows_a_rank, 2)
    return {"w": Entry(tensor=torch.full(shape, float(rank + 1)), rows=rows, opaque=opaque)}


def save_opaque(folder: Path) -> None:
    save(folder, 1, local_entry(4, opaque=True))


def load_opaque(folder: Path, works: bool) -> None:
    ranks = dist.get_world_size()
    entries = local_entry(8 // ranks, opaque=True)
    entries["w"].tensor.zero_()
    arguments = {"rank_tensors": {}, "identity": {"model": "m"}, "rank": dist.get_rank(), "num_ranks": ranks}
    if works:
        load_checkpoint(folder / "step-00000001", entries=entries, **arguments)
        assert entries["w"].tensor.tolist() == [dist.get_rank() + 1.0] * 13
    else:
        with pytest.raises(RecipeError, match="'w' is quantised optimizer state and cannot be cut anew"):
            load_checkpoint(folder / "step-00000001", entries=entries, **arguments)


def test_opaque_tensors_load_only_at_the_same_rows(tmp_path):
    run_on_ranks(save_opaque, 2, tmp_path)
    run_on_ranks(load_opaque, 2, tmp_path, True)
    run_on_ranks(load_opaque, 1, tmp_path, False)
    run_on_ranks(load_opaque, 4, tmp_path, False)


def save_with_full_disks(folder: Path) -> None:
    import resource

    save(folder, 1, local_entry(4))
    if dist.get_rank() >= 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    with pytest.raises(CannotWriteError) as caught:
        save(folder, 2, local_entry(1000))
    assert "rank 2 cannot write" in str(caught.value)
    assert "rank-00002.safetensors: File too large" in str(caught.value)
    assert sorted(os.listdir(folder)) == ["latest", "step-00000001"]
    dist.barrier()
    save(folder, 3, local_entry(4))


def test_the_first_rank_that_cannot_write_fails_all_by_name(tmp_path):
    run_on_ranks(save_with_full_disks, 4, tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"


def save_with_one_bug(folder: Path) -> None:
    entries = local_entry(4)
    if dist.get_rank() == 1:
        entries["w"] = Entry(tensor=torch.zeros(3, 2), rows=entries["w"].rows)
    kind = ValueError if dist.get_rank() == 1 else InfrastructureError
    with pytest.raises(kind, match="local shape") as caught:
        save(folder, 1, entries)
    if dist.get_rank() != 1:
        assert "rank 1 failed with ValueError" in str(caught.value)


def save_with_lost_rows(folder: Path) -> None:
    entries = local_entry(4)
    if dist.get_rank() == 1:
        entries = {}
    kind = ValueError if dist.get_rank() == 0 else InfrastructureError
    with pytest.raises(kind, match=r"tensor 'w' of shape \[8, 2\]: rows 4\.\.8 are saved by no rank"):
        save(folder, 1, entries)


def test_a_bug_on_one_rank_reaches_all(tmp_path):
    run_on_ranks(save_with_one_bug, 2, tmp_path)
    run_on_ranks(save_with_lost_rows, 2, tmp_path)
    assert os.listdir(tmp_path) == []


def save_and_die(folder: Path, dying_rank: int, at: int) -> None:
    """One rank dies at its ``at``-th call that changes the disk; the others see the group break."""
    save(folder, 1, local_entry(4))
    calls, real_mkdir = 0, os.mkdir

    def counted(real):
        def call(*args, **keywords):
            nonlocal calls
            calls += 1
            if dist.get_rank() == dying_rank and calls == at:
                real_mkdir(folder / "killed")
                os._exit(9)
            return real(*args, **keywords)

        return call

    for name in ("mkdir", "pwrite", "write", "fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    save(folder, 2, local_entry(4))


@pytest.mark.parametrize(("dying_rank", "at"), [(1, 1), (1, 2), (1, 4), (0, 2), (0, 7), (0, 11), (0, 13)])
def test_a_rank_that_dies_leaves_the_old_checkpoint(tmp_path, dying_rank, at):
    with pytest.raises(AssertionError, match=r"ranks? (\d )?of \d"):
        run_on_ranks(save_and_die, 2, tmp_path, dying_rank, at)
    assert (tmp_path / "killed").exists()
    found = latest_checkpoint(tmp_path)
    assert found.name in ("step-00000001", "step-00000002")
    assert verify_checkpoint(found, hashes=True) == []
    assert (tmp_path / "latest").read_text().strip() in ("step-00000001", "step-00000002")


def test_errors_of_a_save_carry_exit_codes():
    assert (CannotWriteError.exit_code, InfrastructureError.exit_code) == (73, 69)
    assert issubclass(CannotWriteError, MoeRecipesError)


def first_of(candidates) -> None:
    from moe_recipes.checkpoint.agreement import Agreement

    rank, ranks, agree = dist.get_rank(), dist.get_world_size(), group()["agree"]
    together = Agreement(agree=agree, rank=rank, num_ranks=ranks)
    for chosen in candidates:
        first = together.first_rank(rank in chosen)
        assert first == min(chosen)
        assert together.share_text(f"r{rank} \u00e9" * 99, speaker=rank == first).startswith(f"r{first} \u00e9r")


def test_the_first_of_several_speakers_is_heard():
    run_on_ranks(first_of, 4, [{0}, {3}, {1, 2}, {2, 3}, {0, 1, 2, 3}])
