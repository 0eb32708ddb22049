"""A small checkpoint with every kind of entry, for the tests that save and load in one process."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from moe_recipes.checkpoint.store import Entry, load_checkpoint, save_checkpoint, verify_checkpoint
from moe_recipes.runtime.sharding import Rows

IDENTITY = {"model": "a1b2", "tokenizer": "c3d4"}
ODD_NAME = 'model.layers.0.mlp/experts "x" \\ \u00e9'


def whole(tensor: torch.Tensor, **more) -> Entry:
    shape = tuple(tensor.shape)
    return Entry(tensor=tensor, rows=Rows(start=0, count=(*shape, 1)[0], shape=shape, primary=True), **more)


def sample(seed: int) -> dict[str, Entry]:
    torch.manual_seed(seed)
    return {
        "model.weight": whole(torch.randn(7, 3).bfloat16()),
        ODD_NAME: whole(torch.randn(4, 6).t()),
        "optim.step": whole(torch.tensor(seed, dtype=torch.int64)),
        "optim.rest": whole(torch.randint(-99, 99, (7, 3), dtype=torch.int16)),
        "optim.moment": whole(torch.randint(-99, 99, (5,), dtype=torch.int8)),
        "optim.exp_avg": Entry(
            tensor=torch.randint(0, 255, (11,), dtype=torch.uint8),
            rows=Rows(start=0, count=7, shape=(7, 3), primary=True),
            opaque=True,
        ),
        "empty": whole(torch.zeros(0, 3)),
    }


def save(folder, step, entries=None, **changes):
    arguments = {
        "entries": sample(step) if entries is None else entries,
        "rank_tensors": {"cpu_rng": torch.full((16,), step, dtype=torch.uint8)},
        "state": {"step": step, "position": [1, step]},
        "identity": IDENTITY,
        "rank": 0,
        "num_ranks": 1,
        "barrier": lambda: None,
        "agree": lambda flag: flag,
    }
    return save_checkpoint(folder, step, **{**arguments, **changes})


def load(path, entries, **changes):
    arguments = {"entries": entries, "rank_tensors": {}, "identity": IDENTITY, "rank": 0, "num_ranks": 1}
    return load_checkpoint(path, **{**arguments, **changes})


def assert_holds(path, step) -> None:
    """The checkpoint at ``path`` is good in every byte and holds just what ``save`` wrote for ``step``."""
    assert verify_checkpoint(path, hashes=True) == []
    entries, rng = sample(step + 1000), torch.zeros(16, dtype=torch.uint8)
    state = load(path, entries, rank_tensors={"cpu_rng": rng})
    assert state == {"step": step, "position": [1, step], "rank_tensors_loaded": True}
    for name, entry in sample(step).items():
        assert torch.equal(entries[name].tensor, entry.tensor), name
    assert rng.tolist() == [step] * 16


def shard(path):
    return path / "rank-00000.safetensors"


def save_from_two(folder, step, entries):
    """A checkpoint that two ranks wrote, as threads of this process; ``entries`` are those of each."""
    meeting, said = threading.Barrier(2), [True, True]

    def agree(rank, flag):
        said[rank] = flag
        meeting.wait()
        both = all(said)
        meeting.wait()
        return both

    with ThreadPoolExecutor(max_workers=2) as ranks:
        saves = [
            ranks.submit(
                save,
                folder,
                step,
                entries[rank],
                rank=rank,
                num_ranks=2,
                barrier=meeting.wait,
                agree=functools.partial(agree, rank),
            )
            for rank in (0, 1)
        ]
        return max(done.result() for done in saves)
