"""The demo's data maker, run as a user runs it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import subprocess
import sys

from transformers import AutoTokenizer

from moe_recipes.data.stdlib_chats import make_demo
from tests.unit.data_tools import learned_runs


def folder_hash(folder) -> str:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in paths)).hexdigest()


def test_same_sources_give_the_same_bytes(tmp_path):
    counts = [make_demo(tmp_path / name, max_chats=300, vocab_size=512) for name in ("a", "b")]
    assert "300 chats" in counts[0]
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")


def test_chats_quote_docstrings_and_the_tokenizer_learns_answers(tmp_path):
    make_demo(tmp_path, max_chats=300, vocab_size=512)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(chats) == 300
    assert len({message["content"] for chat in chats for message in chat if message["role"] == "user"}) > 300
    docstring = inspect.getdoc(ast.literal_eval)
    about = next(chat for chat in chats if "ast.literal_eval" in chat[0]["content"])
    assert any(docstring.startswith(message["content"]) for message in about if message["role"] == "assistant")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 512
    assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|im_end|>", "<|endoftext|>"]
    encoded = tokenizer.apply_chat_template(chats[0], return_dict=True, return_assistant_tokens_mask=True)
    expected = [message["content"] + "<|im_end|>" for message in chats[0] if message["role"] == "assistant"]
    assert learned_runs(tokenizer, encoded["input_ids"], encoded["assistant_masks"]) == expected


def test_command_line_reports_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "moe_recipes.data.stdlib_chats", str(tmp_path / "file" / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 73
    assert run.stderr.splitlines()[-1].startswith("moe-recipes: error: ")
    assert "Traceback" not in run.stderr
