"""From rows to packed rows: caching, cutting, holding out; on one rank and on several."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from moe_recipes.config.errors import DataError, MissingInputError
from moe_recipes.config.recipe import Data
from moe_recipes.data import cache, tokens
from moe_recipes.data.loader import IGNORE, RandomRows
from moe_recipes.data.prepare import open_data
from tests.unit.data_tools import GOOD, chat, documents, make_tokenizer, opened, refusal, write_jsonl


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"the cat number {i}"} for i in range(count)]


def test_tokenizer_of_another_model_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    tokenizer = make_tokenizer()
    largest = max(tokenizer.apply_chat_template(GOOD["messages"])["input_ids"])
    for _ in range(2):  # also when the tokens are cached
        message = refusal(tmp_path, path, vocab_size=largest)
        assert f"gives token {largest}, but the model's vocab_size is {largest}" in message
    opened(tmp_path, path, vocab_size=largest + 1)


def test_long_rows_are_refused_by_default(tmp_path):
    rows = [{"text": "a b"}, {"text": "a b c d e f g h i j k"}, {"text": " ".join("abcdefghijklmnop")}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    message = refusal(tmp_path, path, seq_len=8)
    longest = len(make_tokenizer()(rows[2]["text"])["input_ids"]) + 1
    assert message.startswith(f"{path}:2: ")
    assert f"2 rows are too long, the longest has {longest}" in message
    assert message.endswith("set data.long_rows: split|truncate|skip")


def test_long_texts_are_split_without_loss(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": " ".join("abcdefghijklmnopq")}])
    rows, _, report = opened(tmp_path, path, seq_len=8, long_rows="split")
    assert (len(rows.tokens) - 4) % 8  # the last part is a short one
    assert np.array_equal(np.sort(pieces_cover(rows)), np.arange(len(rows.tokens)))
    assert max(rows.piece_length) <= 8
    assert report.train.rows_split == 1
    assert report.train.tokens == len(rows.tokens)
    assert report.train.label_tokens == len(rows.tokens) - len(rows.piece_length) == num_labels(rows)


def pieces_cover(rows) -> np.ndarray:
    pieces = zip(rows.piece_start, rows.piece_length, strict=True)
    return np.concatenate([np.arange(start, start + length) for start, length in pieces])


def num_labels(rows) -> int:
    return sum(int((rows.row(i)[2] != IGNORE).sum()) for i in range(rows.num_rows))


def test_long_chats_are_not_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("the cat " * 20, "b")])
    message = refusal(tmp_path, path, seq_len=32, long_rows="split")
    assert message.startswith(f"{path}:2: ")
    assert message.endswith("set data.long_rows: truncate|skip")


def test_truncate_keeps_the_start_and_counts_what_lost_its_labels(tmp_path):
    rows = [chat("a", "b"), chat("a", "the cat " * 20), chat("the cat " * 20, "b")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    packed, _, report = opened(tmp_path, path, seq_len=32, long_rows="truncate", packing=False)
    train = report.train
    assert (train.rows, train.rows_truncated, train.rows_without_labels, train.packed_rows) == (3, 1, 1, 2)
    assert packed.row(1)[3] == 32
    assert (
        make_tokenizer().decode(packed.row(1)[0]).startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    )
    assert train.label_tokens == num_labels(packed)


def test_skip_leaves_long_rows_out_and_counts_them(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("the cat " * 20, "b"), chat("a", "b")])
    packed, _, report = opened(tmp_path, path, seq_len=32, long_rows="skip")
    assert (report.train.rows, report.train.rows_skipped, len(packed.piece_start)) == (2, 1, 1)
    assert report.train.label_tokens == num_labels(packed)
    write_jsonl(tmp_path / "a.jsonl", [chat("the cat " * 20, "b")])
    assert "no row is left to train on" in refusal(tmp_path, path, seq_len=32, long_rows="skip")


def test_held_out_rows_depend_on_their_content_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(200))
    train, validation, report = opened(tmp_path, path, validation_fraction=0.2)
    assert 20 <= report.validation.rows <= 60  # binomial(200, 0.2): 40, deviation 5.7
    assert report.train.rows + report.validation.rows == 200
    assert not documents(train) & documents(validation)
    more = [{"id": i, **row} for i, row in enumerate(texts(300)[::-1] + texts(200))]
    write_jsonl(tmp_path / "a.jsonl", more)
    train_2, validation_2, _ = opened(tmp_path, path, validation_fraction=0.2)
    assert documents(train) < documents(train_2)
    assert documents(validation) < documents(validation_2)
    assert not documents(train_2) & documents(validation_2)


def test_validation_files_are_the_held_out_rows(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", texts(3))
    held_out = write_jsonl(tmp_path / "v.jsonl", [{"text": "the dog"}])
    rows, validation, report = opened(tmp_path, train, validation=(held_out,))
    assert documents(validation) == {"the dog<|im_end|>"}
    assert report.validation.rows == 1
    assert rows.fingerprint != validation.fingerprint
    assert opened(tmp_path, train)[1] is None
    assert "no row is left for validation" in refusal(tmp_path, train, validation_fraction=1e-9)


def test_second_start_parses_nothing(tmp_path, monkeypatch, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", texts(50))
    with caplog.at_level(logging.INFO, logger="moe_recipes"):
        rows, _, report = opened(tmp_path, path)
    assert "tokenized 50 rows" in caplog.text
    monkeypatch.setattr(tokens, "read_rows", None)
    again, _, again_report = opened(tmp_path, path)
    assert asdict(again_report) == asdict(report)
    assert again.fingerprint == rows.fingerprint
    assert np.array_equal(again.tokens, rows.tokens)
    assert isinstance(again.tokens, np.memmap)
    assert report.train.fill_fraction == report.train.tokens / (report.train.packed_rows * 64)
    json.dumps(asdict(report))


def test_cache_knows_what_it_was_made_from(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, chat("a", "b")])
    base = opened(tmp_path, path)[0]
    folders = lambda: sorted(p.name for p in (tmp_path / "cache").glob("tokens-*"))  # noqa: E731
    assert opened(tmp_path, path, seq_len=128)[0].fingerprint != base.fingerprint
    assert opened(tmp_path, path, packing=False)[0].fingerprint != base.fingerprint
    assert len(folders()) == 1  # neither needs new tokens
    assert opened(tmp_path, path, loss_on="all")[0].fingerprint != base.fingerprint
    other = make_tokenizer(make_tokenizer().chat_template.replace("'\\n'", "' '"))
    assert opened(tmp_path, path, tokenizer=other)[0].fingerprint != base.fingerprint
    opened(tmp_path, path, tokenizer_hash="u")
    assert len(folders()) == 4
    write_jsonl(tmp_path / "a.jsonl", [GOOD, chat("a", "c")])
    assert opened(tmp_path, path)[0].fingerprint != base.fingerprint
    moved = write_jsonl(tmp_path / "moved.jsonl", [GOOD, chat("a", "b")])
    assert opened(tmp_path, moved)[0].fingerprint == base.fingerprint


def test_damaged_cache_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(50))
    opened(tmp_path, path)
    array = next((tmp_path / "cache").glob("tokens-*/tokens.npy"))
    array.write_bytes(array.read_bytes()[:-8])
    message = refusal(tmp_path, path)
    assert str(array.parent) in message
    assert "delete that folder" in message


def test_what_a_killed_run_left_is_removed_after_an_hour(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(5))
    opened(tmp_path, path)
    folder = next((tmp_path / "cache").glob("tokens-*"))
    old, fresh = (folder.parent / f".{folder.name}.{name}" for name in ("old", "fresh"))
    folder.rename(old)
    fresh.mkdir()
    for left in (*old.iterdir(), old):
        os.utime(left, (1e9, 1e9))
    opened(tmp_path, path)
    assert folder.is_dir()
    assert fresh.is_dir()
    assert not old.exists()


def test_other_ranks_need_no_data_files(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(20))
    rows, _, report = opened(tmp_path, path)
    os.remove(path)
    other, _, other_report = opened(tmp_path, path, is_main=False)
    assert np.array_equal(other.tokens, rows.tokens)
    assert other_report == report


def test_failed_main_rank_leaves_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "VISIBLE_AFTER_S", 0.2)
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    opened(tmp_path, path)  # an earlier start went well; the file is then damaged
    write_jsonl(tmp_path / "a.jsonl", ["{"])
    barrier = threading.Barrier(3, timeout=20)
    errors: dict[int, Exception] = {}

    def rank(number: int) -> None:
        try:
            open_data(
                Data(train=(path,), seq_len=64), tokenizer=make_tokenizer(), tokenizer_hash="t", vocab_size=512,
                cache_dir=tmp_path / "cache", seed=0, is_main=number == 0, barrier=lambda: barrier.wait() and None,
            )  # fmt: skip
        except (DataError, MissingInputError) as error:
            errors[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(errors[0], DataError)
    for number in (1, 2):
        assert isinstance(errors[number], MissingInputError)
        assert str(tmp_path / "cache") in str(errors[number])


def test_random_tokens_need_no_files(tmp_path):
    rows, validation, report = opened(tmp_path, format="random_tokens", vocab_size=100, seq_len=16)
    assert isinstance(rows, RandomRows)
    assert (rows.row(0)[0].max() < 100, validation, report.train) == (True, None, None)
    assert not (tmp_path / "cache").exists()
    held_out = opened(tmp_path, format="random_tokens", vocab_size=100, seq_len=16, validation_fraction=0.1)[1]
    assert not np.array_equal(held_out.row(0)[0], rows.row(0)[0])


def test_cache_is_refused_where_nothing_can_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(cache.CannotWriteError, match=r"set data\.cache_dir"):
        opened(tmp_path, write_jsonl(tmp_path / "a.jsonl", [GOOD]))


def test_growing_array_is_a_plain_npy_file(tmp_path):
    path = Path(tmp_path) / "x.npy"
    array = cache.GrowingArray(path, np.int32)
    parts = [np.arange(n) for n in (5, 0, 12345)]
    for part in parts:
        array.append(part)
    array.close()
    assert np.array_equal(np.load(path), np.concatenate(parts))
    assert np.load(path).dtype == np.int32
