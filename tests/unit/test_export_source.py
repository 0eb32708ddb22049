"""An export is like the folder that the model was loaded from: keys, shapes and dtypes, whatever the trainer keeps."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moe_recipes.config.errors import CorruptCheckpointError, NotFiniteError
from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.exporting.export import ExportReport, export_model
from moe_recipes.models.exporting.source import check_like_source, dequantised
from tests.tiny_models import save_tiny_model, tiny_config


def export(model: PreTrainedModel, out: Path, source: Path | None, **changes: object) -> ExportReport:
    arguments: dict[str, object] = {
        "source_dir": source, "config_json": b"{}", "tokenizer_dir": None, "rank": 0, "num_ranks": 1,
        "barrier": lambda: None, "agree": lambda ok: ok,
    }  # fmt: skip
    return export_model(model, out, **(arguments | changes))


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                piece = file.get_slice(key)
                found[key] = piece.get_dtype(), piece.get_shape()
    return found


def rewrite(folder: Path, change: object) -> None:
    """``change(tensors)`` edits the tensors of the folder's only file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def mix_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """Neither what Transformers saves nor what the trainer keeps: one layer's exceptions the other way round."""
    for name, tensor in tensors.items():
        if name.endswith(("e_score_correction_bias", "A_log")):
            tensors[name] = tensor.bfloat16()
        elif name.endswith(("gate.weight", "mixer.D", "norm_f.weight", "experts.3.up_proj.weight")):
            tensors[name] = tensor.float()
        elif name.endswith("lm_head.weight"):
            tensors[name] = (tensor.float() / 8).half()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny_model("nemotron_h", tmp_path / "source", dtype=torch.bfloat16)
    rewrite(tmp_path / "source", mix_dtypes)
    return tmp_path / "source"


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32])
def test_every_dtype_is_the_sources_and_the_record_counts_what_was_cast(
    source: Path, tmp_path: Path, trained: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=trained)
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    report = export(model, tmp_path / "out", source)
    assert headers(tmp_path / "out") == headers(source)
    live = model.state_dict()
    found = {key: t for path in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(path).items()}
    for name in ("layers.0.mixer.A_log", "layers.0.mixer.D", "layers.1.mixer.gate.weight"):
        disk = found[f"backbone.{name}"]
        assert torch.equal(disk, live[f"model.{name}"].to(disk.dtype)), name
    record = json.loads((tmp_path / "out/EXPORT.json").read_text())
    assert record["cast"] == report.cast
    # In bfloat16 two each of A_log, dt_bias and correction bias are kept finer; in float32 all but the source's 8.
    assert report.cast["float32 -> bfloat16"] == (6 if trained == torch.bfloat16 else 67), report.cast
    assert report.cast[f"{str(trained).removeprefix('torch.')} -> float16"] == 1
    assert record["source_keys_left_out"] == []


def test_checksums_of_the_record_are_those_of_the_bytes_on_disk(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    export(model, tmp_path / "out", source, max_file_bytes=60_000)
    record = json.loads((tmp_path / "out/EXPORT.json").read_text())
    on_disk = headers(tmp_path / "out")
    assert record["tensors"].keys() == on_disk.keys()
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert record["files"][path.name]["crc32"] == f"{zlib.crc32(path.read_bytes()):08x}"
        for key, tensor in load_file(path).items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert record["tensors"][key] == [*on_disk[key], f"{zlib.crc32(raw):08x}"], key


def test_random_weights_have_the_dtypes_of_save_pretrained_in_one_process(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("nemotron_h"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "reference")
    export(model, tmp_path / "out", None)
    want = headers(tmp_path / "reference")
    assert headers(tmp_path / "out") == want
    assert want["backbone.layers.0.mixer.A_log"][0] == "F32"
    assert want["backbone.layers.0.mixer.in_proj.weight"][0] == "BF16"
    # A folder beside them says nothing about weights that did not come from it.
    save_tiny_model("nemotron_h", tmp_path / "other", dtype=torch.float32)
    export(model, tmp_path / "again", tmp_path / "other", like_source=False)
    assert headers(tmp_path / "again") == want


def test_keys_too_many_too_few_and_of_another_shape_are_refused_before_training_too(
    source: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    check_like_source(model, source)
    bias = "backbone.layers.0.mixer.dt_bias"
    cases = {
        "lm_head.bias is in the source and not in the model": lambda t: t.update({"lm_head.bias": torch.ones(3)}),
        f"{bias} is in the model and not in the source": lambda t: t.pop(bias),
        rf"{bias} is BF16 \[7\] in the source and BF16 \[8\] in the model": lambda t: t.update({bias: t[bias][:7]}),
        rf"{bias} is I8 \[8\] in the source and F32 \[8\]": lambda t: t.update({bias: t[bias].to(torch.int8)}),
    }
    for number, (line, change) in enumerate(cases.items()):
        folder = tmp_path / f"changed-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        rewrite(folder, change)
        with pytest.raises(CorruptCheckpointError, match=line):
            check_like_source(model, folder)
        with pytest.raises(CorruptCheckpointError, match=line):
            export(model, tmp_path / "out", folder)
        assert not (tmp_path / "out").exists()


def test_what_the_family_ignores_is_left_out_and_recorded(source: Path, tmp_path: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({"mtp.layers.0.norm.weight": torch.ones(64)}))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    report = export(model, tmp_path / "out", source)
    assert report.source_keys_left_out == ("mtp.layers.0.norm.weight",)
    record = json.loads((tmp_path / "out/EXPORT.json").read_text())
    assert record["source_keys_left_out"] == ["mtp.layers.0.norm.weight"]


def test_a_copy_of_a_tied_weight_is_left_out(tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path / "source", dtype=torch.bfloat16)
    rewrite(tmp_path / "source", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    assert export(model, tmp_path / "out", tmp_path / "source").source_keys_left_out == ("lm_head.weight",)


def test_damaged_sources_are_named(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    index = source / "model.safetensors.index.json"
    for text, error, line in (
        ('{"weight_map": {"a": "../../etc/x.safetensors"}}', CorruptCheckpointError, "leaves the model folder"),
        ("{", CorruptCheckpointError, "not a safetensors index"),
        ('{"weight_map": {"a": "model-00001.safetensors"}}', CorruptCheckpointError, "which names other files"),
        ('{"weight_map": {"a": "model.safetensors"}}', CorruptCheckpointError, "lacks the tensor a"),
    ):
        index.write_text(text)
        with pytest.raises(error, match=line):
            export(model, tmp_path / "out", source)
    index.unlink()
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="cut short"):
        export(model, tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_float16_cannot_hold_is_no_infinity_in_the_export(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.lm_head.weight.data[3, 4] = 1e6
    with pytest.raises(NotFiniteError, match=r"lm_head\.weight: a weight is beyond 65504"):
        export(model, tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_codes_count_as_the_tensors_that_they_stand_for() -> None:
    f32, f8, u8, bf16 = torch.float32, torch.float8_e4m3fn, torch.uint8, torch.bfloat16
    found = dequantised(
        {
            "a.weight": (f8, (256, 384)),
            "a.weight_scale_inv": (f32, (2, 3)),
            "b.weight": (bf16, (5,)),
            "experts.down_proj_blocks": (u8, (4, 64, 3, 16)),
            "experts.down_proj_scales": (u8, (4, 64, 3)),
            "experts.down_proj_bias": (bf16, (4, 64)),
        }
    )
    assert found.specs == {
        "a.weight": (bf16, (256, 384)),
        "b.weight": (bf16, (5,)),
        "experts.down_proj": (bf16, (4, 96, 64)),
        "experts.down_proj_bias": (bf16, (4, 64)),
    }
    assert found.quantised == {"fp8": 1, "mxfp4": 1}


def equal_experts(model: PreTrainedModel) -> None:
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    for name in ("gate_up_proj", "down_proj"):
        getattr(second, name).data[5] = getattr(first, name).data[2]


def equal_layers(model: PreTrainedModel) -> None:
    states = [model.model.layers[i].state_dict() for i in (0, 1)]
    for name, tensor in states[0].items():
        if ".experts." not in f".{name}" and tensor.ndim > 1:
            states[1][name].copy_(tensor)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (equal_experts, r"expert 2 of model\.layers\.0\.mlp\.experts and expert 5 of model\.layers\.1\.mlp\.experts"),
        (equal_layers, r"model\.layers\.0 and model\.layers\.1 are equal"),
    ],
)
def test_layers_that_share_an_expert_or_all_matrices_fail_the_certificate(
    tmp_path: Path, change: object, line: str
) -> None:
    save_tiny_model("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    export(model, tmp_path / "out", tmp_path / "source")
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change(model)
    with pytest.raises(NotFiniteError, match=line) as caught:
        export(model, tmp_path / "out", tmp_path / "source")
    assert caught.value.exit_code == 17
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == earlier
    assert "failed" in json.loads((tmp_path / "out.failed/EXPORT.json").read_text())
    assert not (tmp_path / "out.tmp").exists()
