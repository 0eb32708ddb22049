"""Several ranks open the same data: one reads it, all see the same rows, and a step's rows are shared out once."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from moe_recipes.config.recipe import Data
from moe_recipes.data.loader import Batches
from moe_recipes.data.prepare import open_data
from tests.ranks.launch import run_on_ranks
from tests.unit.data_tools import chat, make_tokenizer, write_jsonl


def open_here(folder: Path):
    return open_data(
        Data(train=(str(folder / "a.jsonl"),), seq_len=64),
        tokenizer=make_tokenizer(),
        tokenizer_hash="t",
        vocab_size=512,
        cache_dir=folder / "cache",
        seed=0,
        is_main=dist.get_rank() == 0,
        barrier=dist.barrier,
    )


def check_ranks_share_a_step(folder: Path) -> None:
    rows, _, report = open_here(folder)
    batches = Batches(
        rows, rank=dist.get_rank(), num_ranks=2, micro_batch_size=1, grad_accum_steps=2, seed=0, shuffle=True
    )
    mine = ([row for batch in batches.step(0) for row in batch.row_ids], rows.fingerprint, report.train.rows)
    everyone = [None, None]
    dist.all_gather_object(everyone, mine)
    ids = [row for rank in everyone for row in rank[0]]
    assert len(set(ids)) == len(ids) == 4
    assert everyone[0][1:] == everyone[1][1:]


def test_ranks_share_a_step(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"the cat {i}?", "sat on the mat " * (1 + i % 3)) for i in range(40)])
    run_on_ranks(check_ranks_share_a_step, 2, tmp_path)
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1
