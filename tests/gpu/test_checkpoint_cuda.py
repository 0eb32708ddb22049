"""Checkpoints of CUDA tensors."""

from __future__ import annotations

import pytest
import torch

from moe_recipes.checkpoint.store import Entry, load_checkpoint, save_checkpoint, verify_checkpoint
from moe_recipes.runtime import safetensors_file
from moe_recipes.runtime.sharding import Rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def entries(fill) -> dict[str, Entry]:
    tensors = {
        "weight": fill((1000, 301), torch.bfloat16),
        "columns": fill((301, 1000), torch.int16).t(),
        "moment": fill((77,), torch.int8),
        "step": fill((), torch.float32),
        "none": fill((0, 4), torch.uint8),
    }
    return {
        name: Entry(tensor=t, rows=Rows(start=0, count=(*t.shape, 1)[0], shape=tuple(t.shape), primary=True))
        for name, t in tensors.items()
    }


def test_cuda_tensors_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 65536)
    saved = entries(lambda shape, dtype: torch.randint(0, 99, shape, device="cuda").to(dtype))
    loaded = entries(lambda shape, dtype: torch.zeros(shape, dtype=dtype, device="cuda"))
    common = {"rank_tensors": {"rng": torch.cuda.get_rng_state()}, "identity": {}, "rank": 0, "num_ranks": 1}
    path = save_checkpoint(tmp_path, 1, entries=saved, state={}, barrier=lambda: None, agree=bool, **common)
    assert verify_checkpoint(path, hashes=True) == []
    assert load_checkpoint(path, entries=loaded, **common)["rank_tensors_loaded"]
    for name, entry in saved.items():
        assert torch.equal(loaded[name].tensor, entry.tensor), name


def test_saving_takes_one_chunk_of_host_memory_and_none_of_the_device(tmp_path):
    weight = torch.randn(2**28, device="cuda").view(2**14, -1)
    entry = Entry(tensor=weight, rows=Rows(start=0, count=2**14, shape=tuple(weight.shape), primary=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    common = {"entries": {"w": entry}, "rank_tensors": {}, "identity": {}, "rank": 0, "num_ranks": 1}
    path = save_checkpoint(tmp_path, 1, state={}, barrier=lambda: None, agree=bool, **common)
    expected = weight.clone()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight.zero_()
    load_checkpoint(path, **common)
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal(weight, expected)
