"""Codes become the very values that Transformers makes of them, whichever rows are asked for and however small the
windows are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_recipes.models.loading import stored as load_stored
from moe_recipes.models.loading.files import open_weights
from moe_recipes.models.loading.stored import Quantization, Reader, find_stored, stored_rows

ROWS = [(0, 384), (1, 2), (127, 129), (96, 192), (300, 384), (5, 5)]
WIDE = [128, 384]


@pytest.fixture(params=[None, 700], ids=["one window", "many windows"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(load_stored, "CODE_WINDOW_BYTES", request.param)
        monkeypatch.setattr(load_stored, "WINDOW_BYTES", request.param)


def read(folder: Path, quantization: Quantization | None, like: Tensor, start: int, end: int) -> Tensor:
    with open_weights(folder) as files:
        reader = Reader(files, torch.device("cpu"), quantization)
        stored = find_stored(files, "x", quantization)
        assert stored is not None
        reader.check(stored, tuple(like.shape), like.dtype)
        target = torch.full((end - start, *like.shape[1:]), float("nan")).to(like.dtype)
        reader.read(stored, start, target)
        if stored.kind != "mxfp4" and like.ndim == 2 and end > start:
            places = [files.place(key) for key in stored.keys]
            spans = stored_rows(stored, like.shape, start, end, reader.block[0])
            needed = sum((last - first) * place.row_bytes for (first, last), place in zip(spans, places, strict=True))
            assert reader.num_bytes >= needed
            if load_stored.WINDOW_BYTES > 700:
                assert reader.num_bytes == needed
    return target


def scales_of(kind: str, *shape: int) -> Tensor:
    exponents = torch.randint(-6, 7, shape)
    if kind == "uint8":
        return (exponents + 127).to(torch.uint8)
    if kind == "float8_e8m0fnu":
        return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return (torch.rand(shape) * exponents.float().exp2()).to(getattr(torch, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "uint8", "float8_e8m0fnu"])
@pytest.mark.parametrize("shape", [(384, 384), (4, 128, 256)])
@pytest.mark.usefixtures("windows")
def test_fp8(tmp_path: Path, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = scales_of(kind, *shape[:-2], shape[-2] // 128, shape[-1] // 128)
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    want = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
    assert want.unique().numel() > 100
    for start, end in ROWS if len(shape) == 2 else [(0, 4), (1, 3)]:
        got = read(tmp_path, Quantization(method="fp8"), want, start, end)
        assert torch.equal(got, want[start:end])


@pytest.mark.parametrize("grid", [(1, 1), (384, 12)])
def test_fp8_blocks_of_another_size_than_the_configs(tmp_path: Path, grid: tuple[int, int]) -> None:
    codes, scales = torch.randn(384, 384).to(torch.float8_e4m3fn), torch.rand(grid)
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    want = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.bfloat16)
    with open_weights(tmp_path) as files:
        reader = Reader(files, torch.device("cpu"), Quantization(method="fp8"))
        stored = find_stored(files, "x", Quantization(method="fp8"))
        assert stored is not None
        reader.check(stored, (384, 384), torch.bfloat16)
        got = torch.empty(100, 384, dtype=torch.bfloat16)
        reader.read(stored, 200, got)
    assert torch.equal(got, want[200:300])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("windows")
def test_mxfp4(tmp_path: Path, dtype: torch.dtype) -> None:
    blocks = torch.randint(0, 256, (5, 48, 3, 16), dtype=torch.uint8)
    scales = torch.randint(2, 250, (5, 48, 3), dtype=torch.uint8)
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert tuple(want.shape) == (5, 96, 48)
    for start, end in [(0, 5), (2, 3), (3, 5), (4, 4)]:
        assert torch.equal(read(tmp_path, Quantization(method="mxfp4"), want, start, end), want[start:end])


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("windows")
def test_plain_values_are_cast_once(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    values = torch.randn(64, 6, 5, dtype=torch.float64).to(source)
    save_file({"x": values}, tmp_path / "model.safetensors")
    want = values.to(target)
    for start, end in [(0, 64), (7, 40), (63, 64), (3, 3)]:
        assert torch.equal(read(tmp_path, None, want, start, end), want[start:end])
    with open_weights(tmp_path) as files:
        reader = Reader(files, torch.device("cpu"), None)
        stored = find_stored(files, "x", None)
        assert stored is not None
        wide = torch.zeros(64, 6, 9, dtype=target)
        reader.read(stored, 0, wide[..., 2:7])  # into a part that is not contiguous
    assert torch.equal(wide[..., 2:7], want)
    assert not wide[..., :2].any()
    assert not wide[..., 7:].any()
