"""A quantised source trains on the values that its codes stand for and is exported as bfloat16, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from moe_recipes.config.errors import RecipeError
from moe_recipes.models.build import _dequantised
from tests.ranks.runs import VOCAB_SIZE, train, write_task

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
    """Codes, scales of blocks of 128 x 128, and the bfloat16 values that they stand for."""
    tiles = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scales = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = codes.float() * scales[:, None, :, None]
    return codes.reshape(weight.shape), scales, values.reshape(weight.shape).bfloat16()


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


def fp8_task(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    sizes = {"hidden_size": 384, "intermediate_size": 384, "moe_intermediate_size": 128, "head_dim": 96}
    config = Qwen3MoeConfig(**{**COMMON, "num_key_value_heads": 4}, **sizes, num_experts=4, tie_word_embeddings=False)
    recipe = write_task(folder, config)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return recipe, quantise(folder / "model", settings)


def test_fp8_is_exact_on_one_rank_and_refused_on_several(tmp_path: Path) -> None:
    """Three rows of blocks on two ranks: each border would cut a block, and Transformers 5.24 would not say so."""
    recipe, values = fp8_task(tmp_path / "task")
    done = train(recipe, tmp_path / "one", *STILL, "parallel.fsdp_size=1")
    assert done.returncode == 0, done.stdout
    check_export(tmp_path / "one", values)
    refused = train(recipe, tmp_path / "two", *STILL, "parallel.ep_size=2")
    assert refused.returncode == 64, refused.stdout
    assert "is quantised (fp8), which does not load exactly on 2 ranks" in refused.stdout
    assert "Traceback" not in refused.stdout


def test_mxfp4_is_exact_with_experts_spread_over_ranks(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "layer_types": ["full_attention"]}
    recipe = write_task(tmp_path / "task", GptOssConfig(**COMMON, **sizes, num_local_experts=4))
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    values = quantise(tmp_path / "task" / "model", {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    changes = (*STILL, "parallel.ep_size=2", "model.attn_implementation=eager")
    done = train(recipe, tmp_path / "run", *changes)
    assert done.returncode == 0, done.stdout
    check_export(tmp_path / "run", values)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_codes_are_never_kept_where_a_gpu_could_compute_with_them(method: str) -> None:
    recipe = SimpleNamespace(model=SimpleNamespace(source="x"), parallel=SimpleNamespace(num_ranks=1))
    config = PreTrainedConfig(quantization_config={"quant_method": method})
    assert _dequantised(recipe, config).quantization_config == {"quant_method": method, "dequantize": True}
    with pytest.raises(RecipeError, match=r"is quantised \(gptq\)"):
        _dequantised(recipe, PreTrainedConfig(quantization_config={"quant_method": "gptq"}))
