"""From files to rows: reading every form of file, and refusing what cannot be learned from, by file and line."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_recipes.config.errors import EnvironmentMismatchError, MissingInputError
from tests.unit.data_tools import GOOD, chat, documents, opened, refusal, write_jsonl

BAD_ROWS = [
    ("{", "a.jsonl:2: invalid JSON at column 2"),
    ("[1]", "a.jsonl:2: the line is a JSON list, not an object"),
    ({"messages": []}, "a.jsonl:2: messages must be a list of at least one message"),
    ({"messages": ["hi"]}, "a.jsonl:2: messages[0] is a str"),
    ({"messages": [{"content": "x"}]}, "messages[0] has no role; known: system, user, assistant, tool"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "unknown role 'asistant'; did you mean 'assistant'?"),
    (chat("only a question"), "a.jsonl:2: messages has no assistant turn"),
    (chat("x", ""), "a.jsonl:2: messages[1].content is empty"),
    (chat("x", None), "a.jsonl:2: messages[1].content is null or missing"),
    (chat("x", 3), "messages[1].content is a int, not a string"),
    (chat("x", [{"type": "image", "url": "x"}]), "part of type 'image'; only text parts"),
    ({"text": ""}, "a.jsonl:2: a text row in a file of messages rows; one file holds one shape"),
    ({"conversations": []}, "the row's keys are conversations; needed: messages, or prompt and completion, or text"),
    ({"messages": None}, "the row's keys are none; needed"),
    ({**GOOD, "text": "x"}, "the row fits messages and text; choose one with data.format"),
    (chat("x", "\ud800"), "half of a UTF-16 surrogate pair"),
    ({**GOOD, "tools": "x"}, "tools must be a list of JSON schemas"),
    (chat("", "\n"), "messages[0].content is empty"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_bad_row_is_refused_with_its_line(tmp_path, row, words):
    message = refusal(tmp_path, write_jsonl(tmp_path / "a.jsonl", [GOOD, row, GOOD]))
    assert words in message
    assert "rows are bad" not in message
    assert not list((tmp_path / "cache").glob("*"))  # no half cache, no temporary folder


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": "x", "completion": chat("a", "b")["messages"]}, "must both be strings or both be lists"),
        ({"prompt": chat("a")["messages"], "completion": chat("a")["messages"]}, "completion has no assistant turn"),
        ({"prompt": "x"}, "no completion in the row, which data.format=prompt_completion needs"),
    ],
)
def test_bad_completion_is_refused(tmp_path, row, words):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert words in refusal(tmp_path, path, format="prompt_completion")


SQUAD = {
    "id": "1",
    "context": "Ada wrote it.",
    "question": "Who?",
    "answers": {"text": ["Ada", "A"], "answer_start": [0]},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": {"text": []}}, "answers must be an object whose text is a list of at least one answer"),
        ({"answers": "Ada"}, "answers must be an object"),
        ({"answers": {"text": [" "]}}, "answers.text[0] is empty"),
        ({"question": None}, "no question in the row, which data.format=squad needs"),
        ({"context": ""}, "context is empty"),
    ],
)
def test_bad_reading_row_is_refused(tmp_path, changes, words):
    path = write_jsonl(tmp_path / "a.jsonl", [SQUAD, {**SQUAD, **changes}])
    message = refusal(tmp_path, path, format="squad")
    assert f"{path}:2: " in message
    assert words in message


def test_a_reading_row_is_a_prompt_and_the_first_answer(tmp_path):
    twin = {"prompt": "Ada wrote it.\n\nWho?", "completion": "Ada"}
    read = opened(tmp_path / "squad", write_jsonl(tmp_path / "a.jsonl", [SQUAD]), format="squad")
    as_pair = opened(tmp_path / "pair", write_jsonl(tmp_path / "b.jsonl", [twin]), format="prompt_completion")
    assert documents(read[0]) == documents(as_pair[0])
    assert "needed: messages" in refusal(tmp_path, tmp_path / "a.jsonl", format="auto")
    pq.write_table(pa.Table.from_pylist([SQUAD]), tmp_path / "c.parquet")
    assert documents(opened(tmp_path / "pq", tmp_path / "c.parquet", format="squad")[0]) == documents(read[0])


def test_first_bad_row_is_named_and_all_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, chat("x"), GOOD, "{", GOOD, chat("y", "")])
    message = refusal(tmp_path, path)
    assert message.startswith(f"{path}:2: messages has no assistant turn")
    assert "(3 rows are bad; this is the first)" in message


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    assert "a.jsonl:2: byte 11 of the line is not UTF-8" in refusal(tmp_path, path)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n  \n")
    assert opened(tmp_path, path)[2].train.rows == 1


def test_missing_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no.jsonl does not exist" in refusal(tmp_path, tmp_path / "no.jsonl", error=MissingInputError)
    assert "holds no .jsonl" in refusal(tmp_path, tmp_path / "empty", error=MissingInputError)
    assert "no file matches" in refusal(tmp_path, tmp_path / "*.jsonl", error=MissingInputError)
    assert "cannot load hf:" in refusal(tmp_path, f"hf:{tmp_path}/no", error=MissingInputError)
    (tmp_path / "a.csv").write_text("x")
    assert "a.csv is not one of .jsonl" in refusal(tmp_path, tmp_path / "a.csv")


def test_empty_data_set_is_refused(tmp_path):
    assert "data.train: no row in" in refusal(tmp_path, write_jsonl(tmp_path / "a.jsonl", []))
    assert "data.train: no row in" in refusal(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(
        gzip.compress(b"".join(json.dumps(chat(f"{i}", "x")).encode() + b"\n" for i in range(500)))[:-20]
    )
    assert "the gzip file is damaged or cut short" in refusal(tmp_path, packed)
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1 no")
    assert "a.parquet row 1: the Parquet file is damaged" in refusal(tmp_path, parquet)
    pq.write_table(pa.table({"title": ["x"]}), parquet)
    assert "columns are title; needed: messages" in refusal(tmp_path, parquet)


def test_a_damaged_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "d" / "train.jsonl"
    write_jsonl(path, [GOOD] * 3)
    path.write_bytes(path.read_bytes()[:-20])
    said = refusal(tmp_path, f"hf:{path.parent}")
    assert said.startswith(f"data.train: hf:{path.parent} is damaged: ")
    assert "\n" not in said


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_missing_package_is_named(tmp_path, monkeypatch, package):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    entry = {"pyarrow": tmp_path / "a.parquet", "datasets": "hf:some/data"}[package]
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert f"pip install {package}" in refusal(tmp_path, entry, error=EnvironmentMismatchError)


def test_every_form_of_file_gives_the_same_documents(tmp_path, monkeypatch):
    rows = [chat(f"cat {i}?", f"sat {i}") for i in range(5)]
    write_jsonl(tmp_path / "d" / "sub" / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d" / "sub" / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    expected = documents(opened(tmp_path, tmp_path / "d" / "sub" / "a.jsonl")[0])
    assert len(expected) == 5
    for entry in ("d", "d/*/*.jsonl", "b.jsonl.gz", "c.parquet"):
        assert documents(opened(tmp_path, tmp_path / entry)[0]) == expected
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hf = f"hf:{tmp_path / 'd' / 'sub'}:train"
    assert documents(opened(tmp_path, hf)[0]) == expected
    assert "cannot load" in refusal(tmp_path, hf.replace(":train", ":dev"), error=MissingInputError)


def test_bad_parquet_row_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["the cat", "  "]}), tmp_path / "a.parquet")
    assert "a.parquet row 2: text is empty" in refusal(tmp_path, tmp_path / "a.parquet")
