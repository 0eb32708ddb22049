"""A load under a cap on memory: beside its parameters a rank needs less than two windows, however large a tensor is.

The cap is RLIMIT_DATA, which counts all private writable memory of a process, touched or not; pages of the file cache
are not counted. The files are sparse: their holes read as zeros and take no disk.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from moe_recipes.models.auto import AutoModelForCausalLM
from moe_recipes.models.loading import stored as load_stored
from moe_recipes.models.loading.files import open_weights
from moe_recipes.models.loading.load import load_weights, report_of
from moe_recipes.models.loading.stored import WINDOW_BYTES, Quantization, Reader, find_stored
from moe_recipes.runtime.safetensors_file import create_file, plan_header
from moe_recipes.runtime.sharding import local_tensor
from tests.ranks.launch import RanksFailedError, run_on_ranks

MIB = 2**20
CONFIG = LlamaConfig(
    vocab_size=131072, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (131072, 1024),
    "lm_head.weight": (131072, 1024),
    "model.norm.weight": (1024,),
    **{f"model.layers.0.self_attn.{n}_proj.weight": (1024, 1024) for n in "qkvo"},
    **{f"model.layers.0.mlp.{n}_proj.weight": (1024, 1024) for n in ("gate", "up", "down")},
    **{f"model.layers.0.{n}_layernorm.weight": (1024,) for n in ("input", "post_attention")},
}


def in_use() -> int:
    """Bytes that RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def cap(num_bytes: int) -> None:
    """From now on this process may take so many bytes more."""
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # what torch takes once
    resource.setrlimit(resource.RLIMIT_DATA, (in_use() + num_bytes, resource.RLIM_INFINITY))


def sparse(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    create_file(path, plan_header(tensors, {"format": "pt"}))


def load_a_model(folder: Path, window_bytes: int) -> None:
    load_stored.WINDOW_BYTES = window_bytes
    own = sum(torch.Size(shape).numel() for shape in SHAPES.values())  # half of the tensors, 2 bytes each

    def fill(model: PreTrainedModel, device: torch.device) -> None:
        cap(own + 2 * WINDOW_BYTES)
        load_weights(model, folder, device=device)

    layout = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.filled(CONFIG, fill, dtype=torch.bfloat16, distributed_config=layout)
    assert sum(local_tensor(parameter).nbytes for parameter in model.parameters()) == own
    report = report_of(model)
    assert report is not None
    assert report.bytes_read_max == 2 * own  # float32 in the files


@pytest.mark.parametrize("window_bytes", [WINDOW_BYTES, 2**40])
def test_a_rank_needs_two_windows_beside_its_parameters(tmp_path: Path, window_bytes: int) -> None:
    """256 MiB of the embedding are read into 128 MiB. Read at once they break the cap, so the cap is one."""
    sparse(tmp_path / "model.safetensors", {key: (torch.float32, shape) for key, shape in SHAPES.items()})
    if window_bytes == WINDOW_BYTES:
        run_on_ranks(load_a_model, 2, tmp_path, window_bytes)
        return
    with pytest.raises(RanksFailedError, match=r"(?i)cannot allocate|can't allocate|memory"):
        run_on_ranks(load_a_model, 2, tmp_path, window_bytes)


FP8 = Quantization(method="fp8")
MXFP4 = Quantization(method="mxfp4")
CODES = {
    "fp8": (
        FP8, (16384, 16384),
        {"x": (torch.float8_e4m3fn, (16384, 16384)), "x_scale_inv": (torch.float32, (128, 128))},
    ),
    "fp8 with a ragged border": (
        FP8, (16384, 16400),
        {"x": (torch.float8_e4m3fn, (16384, 16400)), "x_scale_inv": (torch.float32, (128, 129))},
    ),
    "mxfp4": (
        MXFP4, (1, 8192, 8192),
        {"x_blocks": (torch.uint8, (1, 8192, 256, 16)), "x_scales": (torch.uint8, (1, 8192, 256))},
    ),
}  # fmt: skip


def read_codes(folder: Path, kind: str, spoil: Callable[[], None] | None) -> None:
    quantization, shape, _ = CODES[kind]
    if spoil is not None:
        spoil()
    with open_weights(folder) as files:
        reader = Reader(files, torch.device("cpu"), quantization)
        stored = find_stored(files, "x", quantization)
        assert stored is not None
        reader.check(stored, shape, torch.bfloat16)
        target = torch.ones(shape, dtype=torch.bfloat16)
        cap(2 * WINDOW_BYTES)
        reader.read(stored, 0, target)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not target.any()


def large_windows() -> None:
    load_stored.CODE_WINDOW_BYTES = 2**40


@pytest.mark.parametrize("kind", CODES)
def test_codes_become_values_within_two_windows(tmp_path: Path, kind: str) -> None:
    sparse(tmp_path / "model.safetensors", CODES[kind][2])
    run_on_ranks(read_codes, 1, tmp_path, kind, None)
    with pytest.raises(RanksFailedError, match=r"(?i)memory"):
        run_on_ranks(read_codes, 1, tmp_path, kind, large_windows)
