"""Sharded export against ``save_pretrained`` of the same model in one process."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_recipes.config.errors import CannotWriteError, MissingInputError
from moe_recipes.models.auto import AutoModelForCausalLM as OwnAutoModel
from moe_recipes.models.exporting.export import ExportReport, export_model
from moe_recipes.models.exporting.verify import verify_export
from moe_recipes.runtime.sharding import local_rows, local_tensor
from tests.ranks.launch import RanksFailedError, run_on_ranks
from tests.tiny_models import save_tiny_model

FAMILIES = ("qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss", "llama", "llama_tied")


def agree(ok: bool) -> bool:
    votes = torch.tensor([int(ok)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def load_sharded(source: Path, **layout: int) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, distributed_config=DistributedConfig(**layout)
    )


def export_on_ranks(model: torch.nn.Module, source: Path, out: Path, **kwargs: object) -> ExportReport:
    arguments = {
        "source_dir": source, "config_json": (source / "config.json").read_bytes(), "tokenizer_dir": None,
        "rank": dist.get_rank(), "num_ranks": dist.get_world_size(), "barrier": dist.barrier, "agree": agree,
    }  # fmt: skip
    return export_model(model, out, **(arguments | kwargs))


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(folder: Path, reference: Path) -> None:
    got, want = read_folder(folder), read_folder(reference)
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert torch.equal(got[name], want[name]), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  (a safe_open is not a mapping)
            assert opened.metadata() == {"format": "pt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source/FAMILY`` and ``reference/FAMILY``: saved, loaded and saved again by plain Transformers."""
    root = tmp_path_factory.mktemp("export")
    for family in FAMILIES:
        save_tiny_model(family, root / "source" / family, dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(root / "source" / family, dtype=torch.bfloat16)
        model.save_pretrained(root / "reference" / family)
    return root


def check_families(root: Path, out: Path, ep_size: int) -> None:
    ranks = dist.get_world_size()
    for family in FAMILIES:
        layout = {"fsdp_size": ranks} if family.startswith("llama") else {"fsdp_size": ranks, "ep_size": ep_size}
        source = root / "source" / family
        model = load_sharded(source, **layout)
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        report = export_on_ranks(model, source, out / family, max_file_bytes=100_000)
        assert report.gathered == ()
        assert report.source_keys_left_out == ()
        assert verify_export(out / family, model, rank=dist.get_rank(), num_ranks=ranks) == []


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(2, 1), (2, 2), (3, 1), (4, 2)])
def test_sharded_export_equals_save_pretrained(folders: Path, tmp_path: Path, num_ranks: int, ep_size: int) -> None:
    run_on_ranks(check_families, num_ranks, folders, tmp_path, ep_size)
    for family in FAMILIES:
        assert_same_tensors(tmp_path / family, folders / "reference" / family)
        config = (folders / "source" / family / "config.json").read_bytes()
        assert (tmp_path / family / "config.json").read_bytes() == config
        assert not (tmp_path / f"{family}.tmp").exists()
        AutoModelForCausalLM.from_pretrained(tmp_path / family)


def check_replicas(root: Path, out: Path) -> None:
    source = root / "source" / "deepseek_v3"
    model = load_sharded(source, fsdp_size=2, ep_size=2, dp_replicate_size=2)
    export_on_ranks(model, source, out)
    if dist.get_rank() == 3:
        local_tensor(model.model.norm.weight).data.add_(1)
    problems = verify_export(out, model, rank=dist.get_rank(), num_ranks=4)
    assert [problem.split(": ")[1] for problem in problems] == ["model.norm.weight"]


def test_replicas_write_once_and_a_drifted_replica_is_named(folders: Path, tmp_path: Path) -> None:
    run_on_ranks(check_replicas, 4, folders, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folders / "reference" / "deepseek_v3")


def check_conversion_that_mixes_rows(root: Path, out: Path) -> None:
    source = root / "source" / "qwen3_moe"
    model = load_sharded(source, fsdp_size=2, ep_size=2)
    model._weight_conversions = row_mixing_conversions()
    report = export_on_ranks(model, source, out)
    assert sorted(report.gathered) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    assert verify_export(out, model, rank=dist.get_rank(), num_ranks=2) == []


def row_mixing_conversions() -> list[object]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    turned = WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", operations=[Transpose(0, 1)])
    return [*get_checkpoint_conversion_mapping("qwen2_moe"), turned]


def test_a_conversion_that_mixes_rows_is_gathered_alone(folders: Path, tmp_path: Path) -> None:
    run_on_ranks(check_conversion_that_mixes_rows, 2, folders, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folders / "source" / "qwen3_moe", dtype=torch.bfloat16)
    model._weight_conversions = row_mixing_conversions()
    model.save_pretrained(tmp_path / "reference")
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")


def check_sharded_by_columns(root: Path, out: Path) -> None:
    source = root / "source" / "llama"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (2,))
    up = model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(distribute_tensor(up.weight.detach(), mesh, [Shard(1)]))
    report = export_on_ranks(model, source, out)
    assert report.gathered == ("model.layers.0.mlp.up_proj.weight",)


def test_a_tensor_sharded_by_columns_is_gathered_alone(folders: Path, tmp_path: Path) -> None:
    run_on_ranks(check_sharded_by_columns, 2, folders, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folders / "reference" / "llama")


def check_full_disk(root: Path, out: Path) -> None:
    source = root / "source" / "qwen3_moe"
    model = load_sharded(source, fsdp_size=2, ep_size=2)
    export_on_ranks(model, source, out)
    if dist.get_rank() == 1:  # the system refuses this rank's files, as a full disk or a quota does
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    with pytest.raises(CannotWriteError, match=r"rank 1: File too large"):
        export_on_ranks(model, source, out)


def test_one_rank_that_cannot_write_fails_all_and_keeps_the_earlier_export(folders: Path, tmp_path: Path) -> None:
    run_on_ranks(check_full_disk, 2, folders, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", folders / "reference" / "qwen3_moe")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def check_missing_tokenizer(root: Path, out: Path) -> None:
    source = root / "source" / "llama"
    model = load_sharded(source, fsdp_size=2)
    with pytest.raises(MissingInputError, match="nowhere is not a folder"):
        export_on_ranks(model, source, out, tokenizer_dir=out / "nowhere")


def test_an_error_of_rank_0_is_the_same_error_on_all_ranks(folders: Path, tmp_path: Path) -> None:
    run_on_ranks(check_missing_tokenizer, 2, folders, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def check_lost_expert(root: Path, out: Path) -> None:
    model = load_sharded(root / "source" / "qwen3_moe", fsdp_size=2, ep_size=2)
    export_on_ranks(model, root / "source" / "qwen3_moe", out)
    name = "model.layers.1.mlp.experts.down_proj"
    tensor = model.get_parameter(name)
    if local_rows(tensor, rank=dist.get_rank()).start == 4:  # expert 6 of 8 is this rank's third
        local_tensor(tensor).data[2].mul_(2)
    problems = verify_export(out, model, rank=dist.get_rank(), num_ranks=2)
    assert len(problems) == 1  # the same list on every rank
    assert "model.layers.1.mlp.experts.6.down_proj.weight: rows 0..63 differ" in problems[0]


def test_verify_names_the_expert_that_differs_on_another_rank(folders: Path, tmp_path: Path) -> None:
    run_on_ranks(check_lost_expert, 2, folders, tmp_path / "out")


def mix_dtypes(folder: Path) -> None:
    """Give a source other dtypes than Transformers saves: finer and coarser ones, also of single experts."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("e_score_correction_bias", "A_log")):
            tensors[name] = tensor.bfloat16()
        elif name.endswith(("gate.weight", "in_proj.weight", "experts.3.up_proj.weight", "norm_f.weight")):
            tensors[name] = tensor.float()
    save_file(tensors, path, metadata={"format": "pt"})


def check_dtypes_of_the_source(root: Path, source: Path, out: Path) -> None:
    model = OwnAutoModel.from_pretrained(
        source, dtype=torch.bfloat16, distributed_config=DistributedConfig(fsdp_size=4, ep_size=2)
    )
    report = export_on_ranks(model, source, out, max_file_bytes=30_000)
    assert set(report.cast) == {"bfloat16 -> float32", "float32 -> bfloat16"}
    dtypes = {key: tensor.dtype for key, tensor in load_file(source / "model.safetensors").items()}
    assert verify_export(out, model, rank=dist.get_rank(), num_ranks=4, dtypes=dtypes) == []


def test_sharded_tensors_get_the_dtypes_of_the_source(folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders / "source" / "nemotron_h", source)
    mix_dtypes(source)
    run_on_ranks(check_dtypes_of_the_source, 4, folders, source, tmp_path / "out")
    want, got = load_file(source / "model.safetensors"), read_folder(tmp_path / "out")
    assert {key: (t.dtype, t.shape) for key, t in got.items()} == {key: (t.dtype, t.shape) for key, t in want.items()}
    for key, tensor in got.items():  # what bfloat16 kept of a float32 source
        fine = tensor.dtype == torch.float32 and not key.endswith(".D")
        assert torch.equal(tensor, want[key].bfloat16().float() if fine and "gate" not in key else want[key]), key
    record = json.loads((tmp_path / "out" / "EXPORT.json").read_text())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert record["files"][path.name]["crc32"] == f"{zlib.crc32(path.read_bytes()):08x}"


def check_killed(root: Path, out: Path, victim: int, after: int) -> None:
    """Rank ``victim`` dies without a word at one of its writes; ``after`` 0: nobody does."""
    source = root / "source" / "qwen3_moe"
    model = load_sharded(source, fsdp_size=2, ep_size=2)
    calls, real = [0], os.pwrite

    def pwrite(*arguments: object) -> int:
        calls[0] += 1
        if calls[0] == after and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    os.pwrite = pwrite
    export_on_ranks(model, source, out, max_file_bytes=100_000)


@pytest.mark.parametrize(("victim", "after"), [(0, 1), (0, 20), (1, 3), (1, 20)])
def test_kill_point_of_any_rank_keeps_the_earlier_export_and_the_next_is_whole(
    folders: Path, tmp_path: Path, victim: int, after: int
) -> None:
    out = tmp_path / "out"
    run_on_ranks(check_killed, 2, folders, out, 0, 0)
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RanksFailedError):
        run_on_ranks(check_killed, 2, folders, out, victim, after)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier
    assert (tmp_path / "out.tmp").is_dir()
    run_on_ranks(check_killed, 2, folders, out, 0, 0)
    assert_same_tensors(out, folders / "reference" / "qwen3_moe")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def check_unreadable(root: Path, out: Path, first: int) -> None:
    source = root / "source" / "qwen3_moe"
    model = load_sharded(source, fsdp_size=2, ep_size=2)
    calls, real = [0], os.preadv

    def preadv(*arguments: object) -> int:
        calls[0] += 1
        if dist.get_rank() == 1 and calls[0] >= first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    os.preadv = preadv
    with pytest.raises(CannotWriteError, match=r"does not read back: .*Input/output error"):
        export_on_ranks(model, source, out)


@pytest.mark.parametrize("first", [1, 5])  # a header; a tensor, after the headers of three files
def test_a_rank_that_cannot_read_back_fails_all_and_none_waits(folders: Path, tmp_path: Path, first: int) -> None:
    run_on_ranks(check_unreadable, 2, folders, tmp_path / "out", first)
    assert list(tmp_path.iterdir()) == []
