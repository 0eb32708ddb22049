"""What the data tests share: a small byte-level ChatML tokenizer, and ways to write, open and read back rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_recipes.config.errors import DataError
from moe_recipes.config.recipe import Data
from moe_recipes.data.prepare import open_data
from moe_recipes.data.stdlib_chats import train_tokenizer

PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(template: str | None = "generation") -> Any:
    """``template``: ``generation`` keeps the demo's, None removes it, anything else replaces it."""
    tokenizer = train_tokenizer(iter(["the cat sat on the mat and the dog sat on the cat"] * 4), vocab_size=300)
    if template != "generation":
        tokenizer.chat_template = template
    return tokenizer


def learned_runs(tokenizer: Any, ids: Any, mask: Any) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    runs: list[list[int]] = []
    previous = 0
    for token, learned in zip(ids, mask, strict=True):
        if learned and not previous:
            runs.append([])
        if learned:
            runs[-1].append(int(token))
        previous = learned
    return [tokenizer.decode(run) for run in runs]


def chat(*turns: str) -> dict[str, Any]:
    """A messages row: user and assistant take turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Rows that are strings are written as they are. Returns the path as a recipe would hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = chat("the cat?", "sat on the mat")


def opened(tmp_path, *train, vocab_size=512, tokenizer=None, tokenizer_hash="t", is_main=True, seq_len=64, **data):
    return open_data(
        Data(train=tuple(str(entry) for entry in train), seq_len=seq_len, **data),
        tokenizer=tokenizer or make_tokenizer(),
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab_size,
        cache_dir=tmp_path / "cache",
        seed=0,
        is_main=is_main,
        barrier=lambda: None,
    )


def refusal(tmp_path, *train, error=DataError, **data) -> str:
    with pytest.raises(error) as caught:
        opened(tmp_path, *train, **data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def documents(rows) -> set[str]:
    """The text of every document of packed rows."""
    tokenizer = make_tokenizer()
    pieces = zip(rows.piece_start, rows.piece_length, strict=True)
    return {tokenizer.decode(rows.tokens[start : start + length]) for start, length in pieces}
