"""Packing and batches: nothing lost, nothing mixed, and the same rows whatever the layout."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe_recipes.data.loader import IGNORE, Batches, PackedRows, RandomRows
from moe_recipes.data.packing import one_each, pack


def realistic_lengths(count: int, seq_len: int) -> np.ndarray:
    """Log-normal, as chats are, cut at seq_len."""
    lengths = np.random.default_rng(0).lognormal(mean=6.0, sigma=1.0, size=count)
    return np.clip(lengths, 8, seq_len).astype(np.int64)


def packed_rows(lengths, *, seq_len, mask=None, packing=True) -> PackedRows:
    lengths = np.asarray(lengths)
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    order, row_offsets = pack(lengths, seq_len=seq_len) if packing else one_each(lengths)
    mask = np.ones(len(tokens), np.uint8) if mask is None else np.asarray(mask, np.uint8)
    return PackedRows(
        tokens=tokens,
        mask=mask,
        piece_start=starts[order],
        piece_length=lengths[order],
        row_offsets=row_offsets,
        seq_len=seq_len,
        pad_id=0,
        fingerprint="x",
    )


def test_pack_is_best_fit_decreasing():
    order, row_offsets = pack(np.array([2, 5, 3, 6, 4]), seq_len=10)
    rows = [order[first:last].tolist() for first, last in pairwise(row_offsets)]
    assert rows == [[3, 4], [1, 2, 0]]  # 6 + 4 fill a row; then 5 + 3 + 2 fill the other


@pytest.mark.parametrize("seq_len", [512, 4096, 32768])
def test_every_document_is_whole_in_one_row_and_rows_are_full(seq_len):
    lengths = realistic_lengths(20_000, seq_len)
    order, row_offsets = pack(lengths, seq_len=seq_len)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    row_tokens = np.add.reduceat(lengths[order], row_offsets[:-1])
    assert row_tokens.max() <= seq_len
    assert row_offsets[-1] == len(lengths)
    assert row_tokens.mean() / seq_len > 0.98


def test_pack_100k_documents_quickly():
    lengths = realistic_lengths(100_000, 4096)
    started = time.perf_counter()
    pack(lengths, seq_len=4096)
    assert time.perf_counter() - started < 4  # about 0.3 s on an idle core


def test_pack_of_nothing_has_no_rows():
    order, row_offsets = pack(np.array([], np.int64), seq_len=8)
    assert (len(order), row_offsets.tolist()) == (0, [0])


def test_row_restarts_positions_and_never_labels_across_a_border():
    rows = packed_rows([3, 1, 2], seq_len=8, mask=[1, 0, 1, 1, 1, 1])
    input_ids, position_ids, labels, num_tokens = rows.row(0)
    assert input_ids.tolist() == [0, 1, 2, 4, 5, 3, 0, 0]  # longest first: documents 0, 2, 1, then padding
    assert position_ids.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert labels.tolist() == [IGNORE, 2, IGNORE, 5, IGNORE, IGNORE, IGNORE, IGNORE]
    assert num_tokens == 6


def test_one_document_a_row_without_packing():
    rows = packed_rows([3, 1, 2], seq_len=4, packing=False)
    assert [rows.row(i)[0].tolist() for i in range(rows.num_rows)] == [[0, 1, 2, 0], [3, 0, 0, 0], [4, 5, 0, 0]]


def test_changing_one_document_moves_no_other_documents_logits():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    # Rows of the batch: documents of 9 and 3 tokens; of 5, 1, 1, 1 tokens and padding, which counts as a document.
    rows = packed_rows([5, 1, 1, 3, 9, 1], seq_len=12)
    batch = Batches(rows, rank=0, num_ranks=1, micro_batch_size=2, grad_accum_steps=1, seed=0, shuffle=False).step(0)[0]
    documents = [(r, c) for r, row in enumerate(batch.position_ids) for c in range(12) if row[c] == 0]
    assert len(documents) == 7
    logits = logits_of(model, batch.input_ids, batch.position_ids)
    for row, first in documents:
        changed = batch.input_ids.clone()
        changed[row, first] += 100
        moved = (logits_of(model, changed, batch.position_ids) - logits).abs().amax(-1) > 0
        inside = torch.zeros_like(moved)
        last = first + 1
        while last < 12 and batch.position_ids[row, last] != 0:
            last += 1
        inside[row, first:last] = True
        torch.testing.assert_close(moved, inside)


def logits_of(model, input_ids, position_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def all_rows(rows, step, *, num_ranks, micro_batch_size, grad_accum_steps, shuffle=True) -> list[int]:
    """Rows of a step in the order of their positions."""
    per_rank = [
        Batches(rows, rank=rank, num_ranks=num_ranks, micro_batch_size=micro_batch_size, seed=3,
                grad_accum_steps=grad_accum_steps, shuffle=shuffle).step(step) for rank in range(num_ranks)
    ]  # fmt: skip
    return [row for micro in range(grad_accum_steps) for batches in per_rank for row in batches[micro].row_ids]


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_rows_of_a_step_do_not_depend_on_the_layout(step):
    rows = RandomRows(vocab_size=8, seq_len=4, seed=0, num_rows=13)
    one = all_rows(rows, step, num_ranks=1, micro_batch_size=8, grad_accum_steps=1)
    for ranks, micro, accum in [(8, 1, 1), (2, 2, 2), (4, 1, 2), (1, 1, 8)]:
        assert all_rows(rows, step, num_ranks=ranks, micro_batch_size=micro, grad_accum_steps=accum) == one


def test_every_epoch_visits_every_row_once_in_its_own_order():
    rows = RandomRows(vocab_size=8, seq_len=4, seed=0, num_rows=10)
    how = {"num_ranks": 2, "micro_batch_size": 2, "grad_accum_steps": 1}
    visited = [row for step in range(5) for row in all_rows(rows, step, **how)]
    first, second = visited[:10], visited[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    plain = [row for step in range(5) for row in all_rows(rows, step, shuffle=False, **how)]
    assert plain == list(range(10)) * 2


def test_order_is_pinned():
    # The order is part of the format of a run: a resume under another numpy must go on in the same order.
    rows = RandomRows(vocab_size=8, seq_len=4, seed=0, num_rows=8)
    assert all_rows(rows, 0, num_ranks=1, micro_batch_size=8, grad_accum_steps=1) == [6, 1, 5, 2, 7, 4, 3, 0]


def test_step_needs_no_earlier_step():
    rows = packed_rows([3, 1, 2, 4, 4, 2], seq_len=4)
    how = {"rank": 0, "num_ranks": 1, "micro_batch_size": 1, "grad_accum_steps": 2, "seed": 1, "shuffle": True}
    walked = Batches(rows, **how)
    for step in range(20):
        batches = walked.step(step)
        fresh = Batches(rows, **how).step(step)
        for one, other in zip(batches, fresh, strict=True):
            assert one.row_ids == other.row_ids
            assert torch.equal(one.input_ids, other.input_ids)
            assert one.num_label_tokens == int((one.shift_labels != IGNORE).sum())
    assert walked.epoch_of(0) == 0
    assert walked.epoch_of(walked.num_rows) == walked.rows_per_step == 2


def test_random_rows_are_uniform_and_a_function_of_seed_and_index():
    rows = RandomRows(vocab_size=50, seq_len=5000, seed=7)
    input_ids, position_ids, labels, num_tokens = rows.row(3)
    assert np.array_equal(input_ids, RandomRows(vocab_size=50, seq_len=5000, seed=7).row(3)[0])
    assert not np.array_equal(input_ids, rows.row(4)[0])
    assert not np.array_equal(input_ids, RandomRows(vocab_size=50, seq_len=5000, seed=8).row(3)[0])
    counts = np.bincount(input_ids, minlength=50)
    assert len(counts) == 50
    assert ((counts - 100) ** 2 / 100).sum() < 100  # chi-square of 49 degrees of freedom: 1 in 10^5 lies above
    assert position_ids.tolist() == list(range(5000))
    assert labels[:-1].tolist() == input_ids[1:].tolist()
    assert labels[-1] == IGNORE
    assert num_tokens == 5000


def test_batch_tensors_are_int64_of_the_microbatchs_shape():
    rows = RandomRows(vocab_size=50, seq_len=6, seed=0)
    batches = Batches(rows, rank=1, num_ranks=2, micro_batch_size=3, grad_accum_steps=2, seed=0, shuffle=True).step(0)
    assert len(batches) == 2
    for tensor in (batches[0].input_ids, batches[0].position_ids, batches[0].shift_labels):
        assert (tensor.shape, tensor.dtype) == ((3, 6), torch.int64)
    assert batches[0].num_label_tokens == 15
    assert batches[0].num_tokens == 18
