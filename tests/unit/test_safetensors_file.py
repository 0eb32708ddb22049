"""Files written by byte ranges, read back by the safetensors library; and the other way round."""

from __future__ import annotations

import os
import zlib

import pytest
import safetensors.torch
import torch

from moe_recipes.runtime import safetensors_file as sf
from moe_recipes.runtime.safetensors_header import checksum

SHAPES = {"odd": (torch.uint8, (3,)), "w.weight": (torch.bfloat16, (7, 5)), "step": (torch.int64, ())}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (num_bytes,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise: NaN equals NaN."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def test_safetensors_reads_every_dtype_and_shape(tmp_path):
    torch.manual_seed(0)
    shapes = [(3,), (), (0, 4), (5, 3), (2, 3, 4), (3, 0)]
    tensors = {
        f'{sf.DTYPE_NAMES[dtype]}/{shape} \u00e9"\\': random_tensor(dtype, shape)
        for dtype in sf.DTYPE_NAMES
        if dtype not in (torch.complex64, torch.float8_e8m0fnu)
        for shape in shapes
    }
    tensors["columns"] = torch.randn(6, 4).t()
    tensors["every other"] = torch.arange(10)[::2]
    crcs = sf.write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor), name
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert crcs[name] == zlib.crc32(raw), name
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_rows_written_in_any_order_into_a_presized_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sf, "CHUNK_BYTES", 12)  # many chunks, and rows wider than a chunk
    path, layout = tmp_path / "a.safetensors", sf.plan_header(SHAPES)
    sf.create_file(path, layout)
    assert path.stat().st_size == layout.total_bytes
    assert all(place.offset % place.dtype.itemsize == 0 for place in layout.places.values())
    weight = torch.randn(5, 7).bfloat16().t()
    fd = os.open(path, os.O_WRONLY)
    sf.write_rows(fd, layout, "w.weight", 4, weight[4:])
    sf.write_rows(fd, layout, "w.weight", 0, weight[:1].contiguous())
    os.close(fd)
    sf.write_rows(path, layout, "w.weight", 1, weight[1:4])
    sf.write_rows(path, layout, "step", 0, torch.tensor(7))
    loaded = safetensors.torch.load_file(path)
    assert torch.equal(loaded["w.weight"], weight)
    assert loaded["step"].item() == 7
    assert loaded["odd"].tolist() == [0, 0, 0]


def test_reads_rows_of_what_safetensors_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(sf, "CHUNK_BYTES", 12)
    tensors = {"a": torch.randn(9, 5), "b": torch.tensor(3.5, dtype=torch.bfloat16), "c": torch.randint(-9, 9, (4, 2))}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    layout = sf.read_layout(path)
    assert layout.total_bytes == path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    rows, columns, scalar = torch.zeros(4, 5), torch.zeros(5, 4).t(), torch.zeros((), dtype=torch.bfloat16)
    crc = sf.read_rows(fd, layout, "a", 2, rows)
    sf.read_rows(fd, layout, "a", 2, columns)
    sf.read_rows(fd, layout, "b", 0, scalar)
    place = layout.places["a"]
    on_disk = checksum(fd, offset=place.offset, num_bytes=place.num_bytes)
    assert on_disk == zlib.crc32(tensors["a"].numpy().tobytes())
    os.close(fd)
    assert torch.equal(rows, tensors["a"][2:6])
    assert torch.equal(columns, tensors["a"][2:6])
    assert crc == zlib.crc32(tensors["a"][2:6].numpy().tobytes())
    assert scalar.item() == 3.5


@pytest.mark.parametrize(
    ("name", "first_row", "tensor"),
    [
        ("w.weight", 0, torch.zeros(7, 4, dtype=torch.bfloat16)),
        ("w.weight", 0, torch.zeros(7, 5)),
        ("w.weight", 5, torch.zeros(3, 5, dtype=torch.bfloat16)),
        ("w.weight", -1, torch.zeros(1, 5, dtype=torch.bfloat16)),
        ("step", 0, torch.zeros(1, dtype=torch.int64)),
        ("odd", 0, torch.zeros((), dtype=torch.uint8)),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, name, first_row, tensor):
    path, layout = tmp_path / "a.safetensors", sf.plan_header(SHAPES)
    sf.create_file(path, layout)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=name):
        sf.write_rows(path, layout, name, first_row, tensor)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:5],
        lambda raw: raw[:40],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
        lambda raw: raw.replace(b'"U8"', b'"X8"'),
        lambda raw: raw.replace(b"[7,5]", b"[5,5]"),
        lambda raw: raw.replace(b'"shape"', b'"shale"'),
        lambda raw: raw[:8] + b"[" + raw[9:],
    ],
)
def test_damaged_header_is_a_value_error(tmp_path, damage):
    path, layout = tmp_path / "a.safetensors", sf.plan_header(SHAPES)
    sf.create_file(path, layout)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"header|file|tensor|lie"):
        sf.read_layout(path)


def test_plan_refuses_what_safetensors_cannot_hold():
    with pytest.raises(ValueError, match="complex128"):
        sf.plan_header({"a": (torch.complex128, (1,))})
    with pytest.raises(ValueError, match="__metadata__"):
        sf.plan_header({"__metadata__": (torch.uint8, (1,))})
