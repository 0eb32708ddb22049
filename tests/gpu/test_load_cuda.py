"""Weights and codes that become values on a GPU are bit for bit those that a CPU makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_recipes.models.loading import stored as load_stored
from moe_recipes.models.loading.files import open_weights
from moe_recipes.models.loading.stored import Quantization, Reader, find_stored

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FP8, MXFP4 = Quantization(method="fp8"), Quantization(method="mxfp4")
STORED: dict[str, tuple[Quantization | None, tuple[int, ...], Callable[[], dict[str, Tensor]]]] = {
    "plain": (None, (257, 384), lambda: {"x": torch.randn(257, 384)}),
    "same dtype": (None, (257, 384), lambda: {"x": torch.randn(257, 384).bfloat16()}),
    "fp8": (
        FP8,
        (257, 384),
        lambda: {"x": torch.randn(257, 384).to(torch.float8_e4m3fn), "x_scale_inv": torch.rand(3, 3)},
    ),
    "mxfp4": (
        MXFP4,
        (4, 96, 48),
        lambda: {
            "x_blocks": torch.randint(0, 256, (4, 48, 3, 16), dtype=torch.uint8),
            "x_scales": torch.randint(110, 140, (4, 48, 3), dtype=torch.uint8),
        },
    ),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("window_bytes", [None, 4096])
def test_values_are_those_of_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, window_bytes: int | None
) -> None:
    quantization, shape, make = STORED[kind]
    save_file(make(), tmp_path / "model.safetensors")
    if window_bytes is not None:
        monkeypatch.setattr(load_stored, "WINDOW_BYTES", window_bytes)
        monkeypatch.setattr(load_stored, "CODE_WINDOW_BYTES", window_bytes)
    values = {}
    for device in ("cpu", "cuda"):
        with open_weights(tmp_path) as files:
            reader = Reader(files, torch.device(device), quantization)
            stored = find_stored(files, "x", quantization)
            assert stored is not None
            reader.check(stored, shape, torch.bfloat16)
            target = torch.empty((shape[0] - 2, *shape[1:]), dtype=torch.bfloat16, device=device)
            reader.read(stored, 1, target)
        values[device] = target.cpu()
    assert values["cpu"].unique().numel() > 50
    assert torch.equal(values["cpu"], values["cuda"])
