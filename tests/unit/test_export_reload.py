"""The certificate of an export: plain Transformers loads it and computes what the trainer computed, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moe_recipes.config.errors import DoesNotFitError, MissingInputError, NotFiniteError
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.check_export import BOUNDS, PROBE, accept, bounds_of, compare_logits, load
from moe_recipes.models.exporting.export import export_model
from moe_recipes.models.exporting.reload import LIMIT_GIB, UNCERTIFIED, _reload, certificate, needed_bytes
from moe_recipes.runtime.host_memory import free_bytes
from moe_recipes.train.export_run import report_lines
from tests.tiny_models import save_tiny_model


def export(model: PreTrainedModel, run_dir: Path, source: Path, *, reload: bool = True) -> object:
    return export_model(
        model, run_dir / "export", source_dir=source, config_json=(source / "config.json").read_bytes(),
        tokenizer_dir=None, rank=0, num_ranks=1, barrier=lambda: None, agree=lambda ok: ok,
        certify=lambda folder: certificate(folder, run_dir) if reload else UNCERTIFIED,
    )  # fmt: skip


def leave_probe(model: PreTrainedModel, run_dir: Path, *, change: float = 0.0) -> None:
    ids = torch.arange(64).mul(37).remainder(256).view(2, 32)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().contiguous()
    logits[1, 3, 5] += change
    save_file({"input_ids": ids, "logits": logits}, run_dir / PROBE, metadata={"dtype": "float32"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny_model("qwen3_moe", tmp_path / "source", dtype=torch.float32)
    return tmp_path / "source"


@pytest.mark.slow
def test_a_certificate_has_the_difference_of_the_logits_and_who_looked(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    leave_probe(model, tmp_path)
    report = export(model, tmp_path, source)
    record = json.loads((tmp_path / "export/EXPORT.json").read_text())
    assert record["logits"].keys() > {"largest_difference", "mean_kl", "bounds", "prompts", "tokens", "same_top_token"}
    assert (record["logits"]["prompts"], record["logits"]["tokens"]) == (2, 64)
    assert 0 <= record["logits"]["mean_kl"] < 1e-6
    assert record["engines"].keys() == {"transformers", "vllm", "sglang"}
    assert record["engines"]["transformers"]["device"] == "cpu"
    assert record["distinct_experts"] == 16
    lines = report_lines(report)
    assert "69 tensors" in lines[0]
    assert "16 experts, no two of them equal" in lines[1]
    assert "transformers agrees" in lines[2]
    assert "logits differ by" in lines[3]


@pytest.mark.slow
def test_other_logits_than_the_trainers_fail_with_17_and_nobody_can_take_the_folder(
    source: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    leave_probe(model, tmp_path)
    export(model, tmp_path, source, reload=False)
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    leave_probe(model, tmp_path, change=30.0)
    with pytest.raises(
        NotFiniteError, match=r"failed its certificate: .*logits differ .*kept as .*export\.failed"
    ) as caught:
        export(model, tmp_path, source)
    assert caught.value.exit_code == 17
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == earlier
    assert "logits differ" in json.loads((tmp_path / "export.failed/EXPORT.json").read_text())["failed"]
    leave_probe(model, tmp_path)
    export(model, tmp_path, source, reload=False)
    assert not (tmp_path / "export.failed").exists()


def test_a_changed_tensor_is_another_model_to_plain_transformers(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    export(model, tmp_path, source, reload=False)
    path = tmp_path / "export/model-00001-of-00002.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"does not find its weights: model\.norm\.weight \(1 tensors\)"):
        load(tmp_path / "export", torch.float32)
    with pytest.raises(MissingInputError, match="no finished export"):
        load(tmp_path / "nowhere", torch.float32)


def test_an_export_that_does_not_fit_the_host_is_not_reloaded_and_says_what_it_needs(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 1_098_600_000_000}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = certificate(tmp_path, tmp_path)
    assert found["logits"].startswith("not reloaded, needs 1,280.9 GiB of host memory, ")
    assert found["engines"]["transformers"] == found["logits"]
    with pytest.raises(DoesNotFitError, match=r"needs 1,280\.9 GiB of host memory"):
        load(tmp_path, torch.bfloat16)
    assert needed_bytes(100 * 2**30) == 127 * 2**30
    assert needed_bytes(2**40) > LIMIT_GIB * 2**30


def test_a_folder_named_like_an_engine_is_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 1000000000000}}')
    assert certificate(tmp_path, tmp_path)["engines"]["vllm"] == "not installed"


def test_free_memory_is_that_of_the_control_group_where_it_has_less(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert free_bytes(meminfo, group) == 4000 * 1024
    group.mkdir()
    for name, text in {"memory.max": "max", "memory.current": "1000000", "memory.stat": "inactive_file 300000"}.items():
        (group / name).write_text(f"{text}\n")
    assert free_bytes(meminfo, group) == 4000 * 1024
    (group / "memory.max").write_text("3000000\n")
    assert free_bytes(meminfo, group) == 2_300_000


@pytest.mark.parametrize(
    ("own", "root", "files"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu:/\n4:memory:/slurm/job_7/step_0\n0::/",
            "memory/slurm/job_7",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_free_memory_is_that_of_a_jobs_group_of_either_version(own, root, files, tmp_path: Path) -> None:
    """The limit is the job's, above the group that the process itself is in; the machine has more."""
    (tmp_path / "meminfo").write_text("MemAvailable:    4000 kB\n")
    (tmp_path / "own").write_text(f"{own}\n")
    limit, used, returned = files
    group = tmp_path / "group" / root
    (group / "step_0").mkdir(parents=True)
    for folder, most in ((group, 3000000), (group / "step_0", 9223372036854771712)):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("1000000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{returned} 300000\n")
    asked = tmp_path / "meminfo", tmp_path / "group", tmp_path / "own"
    assert free_bytes(*asked) == 2_300_000
    (group / used).write_text("9000000\n")
    assert free_bytes(*asked) == 0


def test_kl_is_that_of_the_definition_and_nan_passes_no_bound(tmp_path: Path) -> None:
    torch.manual_seed(0)
    want, got = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    found = compare_logits(got, want)
    p, q = want.softmax(-1), got.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1)
    assert found.mean_kl == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert found.largest_kl == pytest.approx(float(by_hand.max()), rel=1e-5)
    assert found.largest_difference == pytest.approx(float((want - got).abs().max() / want.abs().max()))
    assert found.same_top_token == pytest.approx(float((want.argmax(-1) == got.argmax(-1)).float().mean()))
    assert compare_logits(want, want).mean_kl == 0
    with pytest.raises(NotFiniteError, match="logits differ"):
        accept(tmp_path, found, BOUNDS[torch.bfloat16])
    shifted = want.clone()
    shifted[0, 0] = shifted[0, 0].roll(1)
    near = compare_logits(want + (shifted - want) * 0.1, want)
    assert near.largest_difference < 0.25
    with pytest.raises(NotFiniteError):
        accept(tmp_path, near, BOUNDS[torch.float32])
    got[1, 2, 3] = float("nan")
    broken = compare_logits(got, want)
    for bounds in BOUNDS.values():
        with pytest.raises(NotFiniteError):
            accept(tmp_path, broken, bounds)


def test_bounds_are_those_of_the_coarsest_dtype_on_disk(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert bounds_of(tmp_path, torch.float32) is BOUNDS[torch.float32]
    save_file({"b": torch.ones(3).bfloat16()}, tmp_path / "other.safetensors")
    assert bounds_of(tmp_path, torch.float32) is BOUNDS[torch.bfloat16]


def test_memory_that_others_took_meanwhile_fails_no_certificate(tmp_path: Path) -> None:
    """The child looks again, and finds less than the trainer found before it."""
    folder = tmp_path / "export"
    folder.mkdir()
    index = {"metadata": {"total_size": 10**15}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"input_ids": torch.zeros(1, 2), "logits": torch.zeros(1, 2, 3)}, tmp_path / PROBE, {"dtype": "float32"})
    found = _reload(folder, tmp_path)
    assert isinstance(found, str)
    assert found.startswith(f"not reloaded, {folder}: loading it needs ")
