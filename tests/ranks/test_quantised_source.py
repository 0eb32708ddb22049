"""A quantised source trains on the values that its codes stand for, and is exported as bfloat16."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from moe_recipes.config.errors import EXIT_CORRUPT_CHECKPOINT, CorruptCheckpointError, OtherRankError, RecipeError
from moe_recipes.config.recipe import Data, Model, Optim, Parallel, Recipe, Train
from moe_recipes.config.run_folder import RunFolder
from moe_recipes.models.build import build_model, quantization_of, read_source
from moe_recipes.models.loading.load import report_of
from moe_recipes.runtime.sharding import local_rows, local_tensor
from tests.ranks.launch import run_on_ranks
from tests.ranks.runs import VOCAB_SIZE, train, write_task
from tests.ranks.test_rehearse import rehearse_in_a_fork

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
STILL = (
    "optim.name=adamw", "optim.lr=1e-25", "optim.weight_decay=0.0", "train.steps=1", "model.dtype=bfloat16",
    "data.packing=false",
)  # fmt: skip
COMMON = {
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "num_hidden_layers": 1, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def fp8_pair(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of blocks of 128 x 128 (the last of a row or column may be narrower), and their bfloat16 values."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    codes, values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scales[row, column] = weight[block].float().abs().max() / 448 + 1e-3 * (row + 1)
            codes[block] = (weight[block].float() / scales[row, column]).to(torch.float8_e4m3fn)
            values[block] = codes[block].float() * scales[row, column]
    return codes, scales, values.bfloat16()


def quantise(folder: Path, settings: dict) -> dict[str, Tensor]:
    """Replace the folder's weights by codes, as published models have them; returns what they stand for, by key."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if settings["quant_method"] == "fp8" and ("_proj." in key and weight.ndim == 2):
            stored[key], stored[f"{key}_scale_inv"], values[key] = fp8_pair(weight)
        elif settings["quant_method"] == "mxfp4" and key.endswith("_proj") and weight.ndim == 3:
            experts, wide, out = weight.shape
            blocks = torch.randint(0, 256, (experts, out, wide // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 123, (experts, out, wide // 32), dtype=torch.uint8)
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
            numbers = FP4[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(-2)
            numbers = numbers * (scales.float() - 127).exp2()[..., None]
            values[key] = numbers.flatten(-2).transpose(1, 2).contiguous().bfloat16()
        else:
            stored[key], values[key] = weight.bfloat16(), weight.bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


def check_export(run_dir: Path, values: dict[str, Tensor]) -> None:
    found = {key: t for path in (run_dir / "export").glob("*.safetensors") for key, t in load_file(path).items()}
    assert found.keys() == values.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert float((tensor.float() - values[key].float()).abs().max()) <= 1e-20, key
    assert "quantization_config" not in json.loads((run_dir / "export" / "config.json").read_text())
    record = json.loads((run_dir / "export" / "EXPORT.json").read_text())
    assert record["config_edits"] == ["quantization_config removed"]
    _, info = AutoModelForCausalLM.from_pretrained(run_dir / "export", output_loading_info=True)
    assert not any(info.values())


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def fp8_config(**changes: int) -> PreTrainedConfig:
    """Three rows of blocks in each attention weight: on two and on four ranks every border cuts a block."""
    sizes = {"hidden_size": 384, "intermediate_size": 384, "moe_intermediate_size": 128, "head_dim": 96, **changes}
    return Qwen3MoeConfig(**{**COMMON, "num_key_value_heads": 4}, **sizes, num_experts=4, tie_word_embeddings=False)


def mxfp4_config() -> PreTrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "layer_types": ["full_attention"]}
    return GptOssConfig(**COMMON, **sizes, num_local_experts=4)


def test_fp8_is_exact_with_borders_inside_of_blocks(tmp_path: Path) -> None:
    recipe = write_task(tmp_path / "task", fp8_config())
    values = quantise(tmp_path / "task" / "model", FP8)
    done = train(recipe, tmp_path / "run", *STILL, "parallel.ep_size=2")
    assert done.returncode == 0, done.stdout
    check_export(tmp_path / "run", values)
    said = json.loads(RunFolder(tmp_path / "run").manifest.read_bytes())["weights"]
    assert f"weights: {said['bytes_read_max'] / 1e9:.3f} GB a rank" in done.stdout
    stored = load_file(tmp_path / "task" / "model" / "model.safetensors")
    assert said["bytes_read_min"] <= said["bytes_read_max"] < said["bytes_read_total"]
    scales = sum(tensor.nbytes for key, tensor in stored.items() if key.endswith("_scale_inv"))
    least = sum(tensor.nbytes for tensor in stored.values())
    assert least <= said["bytes_read_total"] <= least + scales  # a scale of a block that a border cuts is read twice
    assert (said["files"], said["keys_left_out"]) == (1, [])
    assert said["seconds"] > 0


def test_mxfp4_is_exact_with_experts_spread_over_ranks(tmp_path: Path) -> None:
    recipe = write_task(tmp_path / "task", mxfp4_config())
    values = quantise(tmp_path / "task" / "model", MXFP4)
    changes = (*STILL, "parallel.ep_size=2", "model.attn_implementation=eager")
    done = train(recipe, tmp_path / "run", *changes)
    assert done.returncode == 0, done.stdout
    check_export(tmp_path / "run", values)


def save_quantised(config: PreTrainedConfig, folder: Path, settings: dict) -> None:
    """The tiny model and, beside it, ``values.pt``: what its codes stand for."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    torch.save(quantise(folder, settings), folder / "values.pt")


def recipe_of(folder: Path, *, num_ranks: int, ep_size: int, dtype: str) -> Recipe:
    return Recipe(
        name="codes",
        model=Model(source=str(folder), dtype=dtype, attn_implementation="eager"),
        parallel=Parallel(fsdp_size=num_ranks, ep_size=ep_size),
        data=Data(seq_len=32, format="random_tokens"),
        optim=Optim(lr=1e-3),
        train=Train(steps=1),
    )


def check_equal(folder: Path, num_ranks: int, ep_size: int, dtype: str, by_transformers: bool) -> None:
    recipe = recipe_of(folder, num_ranks=num_ranks, ep_size=ep_size, dtype=dtype)
    model = build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    assert not hasattr(model.config, "quantization_config")
    if by_transformers:
        config = AutoConfig.from_pretrained(folder)
        config.quantization_config = {**config.quantization_config, "dequantize": True}
        whole = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, dtype)).state_dict()
    else:
        plain, values = folder.with_name("plain"), torch.load(folder / "values.pt")
        plain.mkdir(exist_ok=True)
        path = plain / f"{dist.get_rank()}"
        path.mkdir()
        save_file(values, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (path / "config.json").write_text(json.dumps(config))
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).state_dict()
    state = model.state_dict()
    assert state.keys() == whole.keys()
    for name, tensor in state.items():
        rows = local_rows(tensor, rank=dist.get_rank())
        assert local_tensor(tensor).dtype == whole[name].dtype == getattr(torch, dtype), name
        assert torch.equal(local_tensor(tensor), whole[name][rows.start : rows.start + rows.count]), name


LAYOUTS = [(1, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.parametrize(("num_ranks", "ep_size"), LAYOUTS)
@pytest.mark.parametrize(
    ("make_config", "settings", "dtype"),
    [(fp8_config, FP8, "bfloat16"), (mxfp4_config, MXFP4, "bfloat16"), (mxfp4_config, MXFP4, "float32")],
)
def test_values_are_those_of_transformers_in_one_process(
    tmp_path: Path,
    make_config: Callable[[], PreTrainedConfig],
    settings: dict,
    dtype: str,
    num_ranks: int,
    ep_size: int,
) -> None:
    run_on_ranks(save_quantised, 1, make_config(), tmp_path / "model", settings)
    run_on_ranks(check_equal, num_ranks, tmp_path / "model", num_ranks, ep_size, dtype, True)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_blocks_that_do_not_fill_the_weight_keep_their_own_scales(tmp_path: Path, num_ranks: int) -> None:
    """As DeepSeek-V3's kv_a_proj_with_mqa: 576 rows in blocks of 128. Transformers refuses such a weight, or takes the
    blocks to be narrower than they are; so the values are computed here, block by block."""
    config = fp8_config(hidden_size=192, moe_intermediate_size=160, head_dim=80)
    run_on_ranks(save_quantised, 1, config, tmp_path / "model", FP8)
    run_on_ranks(check_equal, num_ranks, tmp_path / "model", num_ranks, 1, "bfloat16", False)


def check_bytes(folder: Path, record: dict) -> None:
    recipe = recipe_of(folder, num_ranks=4, ep_size=2, dtype="bfloat16")
    model = build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    report = report_of(model)
    assert report is not None
    said = [rank["read_bytes"] for rank in record["ranks"]]
    assert (min(said), max(said), sum(said)) == (
        report.bytes_read_min,
        report.bytes_read_max,
        report.bytes_read_total,
    )


@pytest.mark.parametrize(("make_config", "settings"), [(fp8_config, FP8), (mxfp4_config, MXFP4)])
def test_the_rehearsal_counts_the_bytes_that_are_read(
    tmp_path: Path, make_config: Callable[[], PreTrainedConfig], settings: dict
) -> None:
    run_on_ranks(save_quantised, 1, make_config(), tmp_path / "model", settings)
    recipe = recipe_of(tmp_path / "model", num_ranks=4, ep_size=2, dtype="bfloat16")
    code, record = rehearse_in_a_fork(recipe, tmp_path / "out", "--all")
    assert (code, record["problems"], record["source_keys_left_out"]) == (0, [], [])
    run_on_ranks(check_bytes, 4, tmp_path / "model", record)


def check_refusal(folder: Path, message: str) -> None:
    recipe = recipe_of(folder, num_ranks=2, ep_size=1, dtype="bfloat16")
    with pytest.raises((CorruptCheckpointError, OtherRankError), match=message) as caught:
        build_model(recipe, read_source(recipe), scratch=folder / f"scratch-{dist.get_rank()}")
    assert caught.value.exit_code == EXIT_CORRUPT_CHECKPOINT
    assert "\n" not in str(caught.value)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.experts.down_proj"


def without(*keys: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in keys}


DAMAGE: dict[str, tuple[Callable[[], PreTrainedConfig], dict, Callable, dict | None, str]] = {
    "no scale": (
        fp8_config, FP8, without(f"{Q_PROJ}_scale_inv"), FP8, f"{Q_PROJ} is float8_e4m3fn, which cannot become bfloat16"
    ),
    "other grid": (
        fp8_config, FP8, lambda t: t | {f"{Q_PROJ}_scale_inv": torch.ones(5, 3)}, FP8,
        rf"{Q_PROJ}_scale_inv has \[5, 3\] scales, which do not fit blocks of 128 x 128",
    ),
    "no config": (fp8_config, FP8, without(), None, "no quantization_config"),
    "no mxfp4 scales": (mxfp4_config, MXFP4, without(f"{DOWN}_scales"), MXFP4, f"no weights for {DOWN} "),
    "mxfp4 shape": (
        mxfp4_config, MXFP4, lambda t: t | {f"{DOWN}_blocks": torch.zeros(4, 64, 2, 16, dtype=torch.uint8)}, MXFP4,
        rf"{DOWN}_blocks has another shape than in the model: \[4, 64, 2, 16\], not \[4, 64, 3, 16\]",
    ),
    "mxfp4 dtype": (
        mxfp4_config, MXFP4, lambda t: t | {f"{DOWN}_scales": t[f"{DOWN}_scales"].int()}, MXFP4,
        rf"{DOWN}_blocks is uint8, int32, which cannot become bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_codes_that_do_not_fit_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    make_config, settings, change, written, message = DAMAGE[damage]
    folder = tmp_path / "model"
    run_on_ranks(save_quantised, 1, make_config(), folder, settings)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": written}))
    run_on_ranks(check_refusal, 2, folder, message)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [0, 1]}])
def test_codes_that_are_not_known_are_the_recipes_error(settings: dict) -> None:
    recipe = recipe_of(Path("x"), num_ranks=1, ep_size=1, dtype="bfloat16")
    with pytest.raises(RecipeError, match=rf"is quantised \({settings['quant_method']}\)"):
        quantization_of(recipe, {"quantization_config": settings})
    random = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights="random"))
    assert quantization_of(random, {"quantization_config": settings}) is None
