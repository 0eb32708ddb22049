"""Export in one process: names and values against ``save_pretrained``, damage that must be found, folders that stay."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_recipes.config.errors import (
    CannotWriteError,
    CorruptCheckpointError,
    MissingInputError,
    NotFiniteError,
    RecipeError,
)
from moe_recipes.models.exporting import folder as export_folder
from moe_recipes.models.exporting.export import ExportReport, export_model
from moe_recipes.models.exporting.folder import without_top_key
from moe_recipes.models.exporting.plan import plan_export, spec_bytes
from moe_recipes.models.exporting.verify import verify_export
from tests.tiny_models import save_tiny_model, tiny_config

FAMILIES = ("qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss", "llama", "llama_tied")
EXPERT_KEYS = {
    "qwen3_moe": "model.layers.1.mlp.experts.7.gate_proj.weight",
    "deepseek_v3": "model.layers.2.mlp.experts.7.up_proj.weight",
    "nemotron_h": "backbone.layers.1.mixer.experts.7.down_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj_bias",
}


def export(model: PreTrainedModel, out: Path, **changes: object) -> ExportReport:
    arguments: dict[str, object] = {
        "source_dir": None, "config_json": b"{}", "tokenizer_dir": None, "rank": 0, "num_ranks": 1,
        "barrier": lambda: None, "agree": lambda ok: ok,
    }  # fmt: skip
    return export_model(model, out, **(arguments | changes))


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(folder: Path, reference: Path) -> None:
    got, want = read_folder(folder), read_folder(reference)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny sources, one a family, in bf16 with the families' fp32 exceptions."""
    root = tmp_path_factory.mktemp("source")
    for family in FAMILIES:
        save_tiny_model(family, root / family, dtype=torch.bfloat16)
    return root


@pytest.fixture
def model(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source / "qwen3_moe", dtype=torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_equals_save_pretrained(source: Path, tmp_path: Path, family: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(source / family, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "reference")
    report = export(loaded, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")
    assert EXPERT_KEYS.get(family, "model.norm.weight") in read_folder(tmp_path / "out")
    assert report.num_keys == len(read_folder(tmp_path / "reference"))
    assert (report.num_files, report.gathered) == (1 if family in ("gpt_oss", "llama", "llama_tied") else 2, ())
    assert verify_export(tmp_path / "out", loaded, rank=0, num_ranks=1) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_a_model_that_was_never_loaded_exports_like_save_pretrained(tmp_path: Path, family: str) -> None:
    made = AutoModelForCausalLM.from_config(tiny_config(family))
    made.save_pretrained(tmp_path / "reference")
    export(made, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_correction_bias_stays_fp32_in_a_bf16_export(source: Path, tmp_path: Path, family: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(source / family, dtype=torch.bfloat16)
    export(loaded, tmp_path / "out")
    biases = {name: t for name, t in read_folder(tmp_path / "out").items() if "e_score_correction_bias" in name}
    assert biases
    assert {tensor.dtype for tensor in biases.values()} == {torch.float32}


def test_files_stay_under_the_limit_and_the_record_has_their_hashes(model: PreTrainedModel, tmp_path: Path) -> None:
    limit = 60_000
    report = export(model, tmp_path / "out", max_file_bytes=limit)
    record = json.loads((tmp_path / "out" / "EXPORT.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report.num_files > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    for path in [*files, tmp_path / "out" / "config.json"]:
        assert record["files"][path.name]["bytes"] == path.stat().st_size
    for path in files:
        assert record["files"][path.name]["crc32"] == f"{zlib.crc32(path.read_bytes()):08x}"
    for name in ("config.json", "model.safetensors.index.json"):
        assert record["files"][name]["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    assert (record["keys"], record["bytes"]) == (report.num_keys, report.total_bytes)


def damage(folder: Path, key: str, change: object) -> None:
    """Rewrite the file that holds ``key`` with the safetensors library after ``change(tensors)``."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][key]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_verify_finds_two_swapped_experts(model: PreTrainedModel, tmp_path: Path) -> None:
    export(model, tmp_path)
    a, b = (f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (2, 5))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    damage(tmp_path, a, swap)
    problems = verify_export(tmp_path, model, rank=0, num_ranks=1)
    assert [problem.split(": ")[1] for problem in problems] == [a, b]


def test_verify_finds_a_dropped_and_a_foreign_key(model: PreTrainedModel, tmp_path: Path) -> None:
    export(model, tmp_path)
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    damage(tmp_path, key, lambda tensors: tensors.update(extra=tensors.pop(key)))
    problems = verify_export(tmp_path, model, rank=0, num_ranks=1)
    assert len(problems) == 2
    assert any(f"{key} is missing" in problem for problem in problems)
    assert any("extra is not this file's" in problem for problem in problems)


def test_verify_finds_another_shape_a_lost_file_and_a_wrong_index(model: PreTrainedModel, tmp_path: Path) -> None:
    export(model, tmp_path, max_file_bytes=60_000)
    key = "model.layers.1.input_layernorm.weight"
    damage(tmp_path, key, lambda tensors: tensors.update({key: tensors[key][:-1]}))
    lost = sorted(tmp_path.glob("*.safetensors"))[-1]
    lost.unlink()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = " | ".join(verify_export(tmp_path, model, rank=0, num_ranks=1))
    assert f"{key} is torch.bfloat16 (63,), the model has torch.bfloat16 (64,)" in problems
    assert f"{lost.name}: cannot be read" in problems
    assert "index.json: lm_head.weight is missing" in problems


@pytest.mark.parametrize(("family", "module"), [("qwen3_moe", "layers.1.mlp"), ("gpt_oss", "layers.0.mlp")])
def test_verify_names_equal_experts(source: Path, tmp_path: Path, family: str, module: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(source / family, dtype=torch.bfloat16)
    for parameter in loaded.model.get_submodule(f"{module}.experts").parameters():
        parameter.data[6] = parameter.data[1]
    with pytest.raises(NotFiniteError, match=rf"experts 1 and 6 are equal .*kept as {tmp_path}/out.failed"):
        export(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "experts 1 and 6" in json.loads((tmp_path / "out.failed/EXPORT.json").read_text())["failed"]
    export(loaded, tmp_path / "out", verify=False)
    problems = verify_export(tmp_path / "out", loaded, rank=0, num_ranks=1)
    assert problems == [f"model.{module}.experts: experts 1 and 6 are equal"]


def test_companions_and_config_are_copied_byte_for_byte(model: PreTrainedModel, source: Path, tmp_path: Path) -> None:
    origin, tokenizer = tmp_path / "origin", tmp_path / "tokenizer"
    origin.mkdir()
    tokenizer.mkdir()
    config = b'{\n  "z": 1,\n  "tiny": 1e-6,\n  "a": [Infinity]\n}'
    for path, data in {
        origin / "generation_config.json": b'{"eos_token_id":  2}',
        origin / "tokenizer.json": b"old",
        origin / "modeling_custom.py": b"# code",
        origin / "config.json": b"not this one",
        origin / "pytorch_model.bin": b"weights",
        tokenizer / "tokenizer.json": b"new",
        tokenizer / "chat_template.jinja": b"{% generation %}",
    }.items():
        path.write_bytes(data)
    report = export(model, tmp_path / "out", source_dir=origin, tokenizer_dir=tokenizer, config_json=config)
    assert report.copied == ("chat_template.jinja", "generation_config.json", "modeling_custom.py", "tokenizer.json")
    assert report.config_edits == ()
    assert (tmp_path / "out/config.json").read_bytes() == config
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"new"
    assert (tmp_path / "out/generation_config.json").read_bytes() == b'{"eos_token_id":  2}'
    assert not (tmp_path / "out/pytorch_model.bin").exists()


def test_quantization_config_is_cut_out_and_listed(model: PreTrainedModel, tmp_path: Path) -> None:
    config = '{\n  "a": 1e-6,\n  "quantization_config": {"x": {"y": [1]}},\n  "b": "quantization_config"\n}\n'
    export(model, tmp_path / "out", config_json=config.encode())
    assert (tmp_path / "out/config.json").read_text() == '{\n  "a": 1e-6,\n  "b": "quantization_config"\n}\n'
    assert json.loads((tmp_path / "out/EXPORT.json").read_text())["config_edits"] == ["quantization_config removed"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"k": 1}', "{}"),
        ('{"a": "\\"k\\": {", "k": [{"k": 2}]}', '{"a": "\\"k\\": {"}'),
        ('{"k": null, "a": {"k": 1}}', '{"a": {"k": 1}}'),
        ('{ "a": 1 }\n', '{ "a": 1 }\n'),
    ],
)
def test_without_top_key(text: str, want: str) -> None:
    got = without_top_key(text, "k")
    assert got == want
    assert json.loads(got) == {name: value for name, value in json.loads(text).items() if name != "k"}


@pytest.mark.parametrize("text", ["", "[1]", "{", "3"])
def test_a_config_that_is_no_object_is_refused(model: PreTrainedModel, tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"config\.json is not a JSON object"):
        export(model, tmp_path / "out", config_json=text.encode())
    assert list(tmp_path.iterdir()) == []


def test_source_tensors_without_a_place_in_the_model_are_named(
    model: PreTrainedModel, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = read_folder(source / "qwen3_moe") | {"mtp.layers.0.weight": torch.ones(2)}
    (tmp_path / "origin").mkdir()
    save_file(tensors, tmp_path / "origin/model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"mtp\.layers\.0\.weight is in the source and not in the model"):
        export(model, tmp_path / "out", source_dir=tmp_path / "origin")
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]
    model._keys_to_ignore_on_load_unexpected = {r"mtp\..*"}
    with caplog.at_level(logging.WARNING):
        report = export(model, tmp_path / "out", source_dir=tmp_path / "origin")
    assert report.source_keys_left_out == ("mtp.layers.0.weight",)
    assert "1 tensors" in caplog.text
    assert "mtp.layers.0.weight" in caplog.text


def test_a_folder_that_is_no_export_is_never_replaced(model: PreTrainedModel, source: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (source / "qwen3_moe").iterdir()}
    with pytest.raises(CannotWriteError, match=r"holds no EXPORT\.json"):
        export(model, source / "qwen3_moe", source_dir=source / "qwen3_moe")
    assert {path.name: path.read_bytes() for path in (source / "qwen3_moe").iterdir()} == before


def test_missing_source_and_unwritable_target_are_one_line(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere is not a folder"):
        export(model, tmp_path / "out", source_dir=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="rank 0: File exists"):
        export(model, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def killed_at(function: str, count: int, model: PreTrainedModel, out: Path) -> bool:
    """Export in a child that dies without a word at the ``count``-th ``os.<function>``; False if it came through."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(os, function), [0]

        def die(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, function, die)
        export(model, out)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("function", ["ftruncate", "fsync", "rename"])
def test_a_killed_export_keeps_the_earlier_one_and_starts_again(
    model: PreTrainedModel, tmp_path: Path, function: str
) -> None:
    out = tmp_path / "out"
    export(model, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    model.model.norm.weight.data.add_(1)
    deaths = 0
    while killed_at(function, deaths + 1, model, out):
        deaths += 1
        complete = out if out.exists() else export_folder.old_folder(out)
        found = {path.name: path.read_bytes() for path in complete.iterdir()}
        assert found == first or verify_export(complete, model, rank=0, num_ranks=1) == []
    assert deaths >= 2
    assert verify_export(out, model, rank=0, num_ranks=1) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_died_between_its_renames_is_undone(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(model, out)
    out.rename(export_folder.old_folder(out))
    with pytest.raises(MissingInputError):
        export(model, out, source_dir=tmp_path / "nowhere")
    assert verify_export(out, model, rank=0, num_ranks=1) == []


def test_keys_that_the_family_does_not_save_are_left_out(model: PreTrainedModel, tmp_path: Path) -> None:
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    model.save_pretrained(tmp_path / "reference")
    export(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")
    assert "model.norm.weight" not in read_folder(tmp_path / "out")


def test_planning_a_30b_model_takes_seconds_and_no_memory() -> None:
    config = tiny_config("qwen3_moe")
    config.update({"num_hidden_layers": 48, "num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768})
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
    plan, _, _ = plan_export(large, rank=0, num_ranks=1, max_file_bytes=5 * 10**9)
    assert len(plan.weight_map) == 48 * (3 * 128 + 9) + 3
    assert {tensor.how for tensor in plan.tensors} == {"rows", "experts"}
    sizes = [sum(spec_bytes(spec) for spec in file.tensors.values()) for file in plan.files]
    assert max(sizes) <= 5 * 10**9
    own = sizes[-11:]  # 116 GB of experts in float32, after the dense tensors
    assert min(own[:-1]) > 4.98 * 10**9
    assert sum(sizes) == plan.total_bytes
