"""A row as read -> what it says, or one line about what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from moe_recipes.config.errors import did_you_mean

ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = ("messages", "tools", "prompt", "completion", "text", "context", "question", "answers")

_KEYS_OF_SHAPE = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "squad": ("context", "question", "answers"),
}


class RowProblem(Exception):
    """What is wrong with one row, and how to mend it. The reader adds the place and counts the rows."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the chat template. Every ``content`` is a string."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first_learned: int = 0
    """Assistant turns before this index are context and carry no loss."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Two strings. A chat of two turns where the tokenizer has a chat template, else plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; every token is learned."""

    text: str


Example = Chat | Completion | Text


def shape_of(row: dict[str, Any], *, shape: str) -> str:
    """``messages``, ``prompt_completion``, ``text`` or ``squad``, by the row's keys.

    Args:
        shape: the recipe's ``data.format``; with ``auto`` exactly one of the shapes but ``squad`` must fit.
    Raises:
        RowProblem: none fits, or with ``auto`` several.
    """
    fits = [name for name, keys in _KEYS_OF_SHAPE.items() if all(row.get(key) is not None for key in keys)]
    if shape != "auto":
        if shape not in fits:
            missing = [key for key in _KEYS_OF_SHAPE[shape] if row.get(key) is None]
            raise RowProblem(f"no {' and no '.join(missing)} in the row, which data.format={shape} needs")
        return shape
    fits = [name for name in fits if name != "squad"]
    if len(fits) > 1:
        raise RowProblem(f"the row fits {' and '.join(fits)}; choose one with data.format")
    if not fits:
        keys = ", ".join(sorted(key for key in row if row[key] is not None)) or "none"
        raise RowProblem(f"the row's keys are {keys}; needed: messages, or prompt and completion, or text")
    return fits[0]


def parse_row(row: dict[str, Any], *, shape: str) -> Example:
    """The row's content in its shape (see ``shape_of``). Other keys are not looked at.

    Raises:
        RowProblem: the content cannot be learned from.
    """
    if shape == "messages":
        messages = _messages(row["messages"], key="messages")
        _require_assistant(messages, key="messages")
        return Chat(messages, tools=_tools(row))
    if shape == "text":
        return Text(_string(row["text"], key="text"))
    if shape == "squad":
        return _reading(row)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(_string(prompt, key="prompt"), _string(completion, key="completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, key="prompt")
        answer = _messages(completion, key="completion")
        _require_assistant(answer, key="completion")
        return Chat(context + answer, tools=_tools(row), first_learned=len(context))
    raise RowProblem("prompt and completion must both be strings or both be lists of messages")


def _reading(row: dict[str, Any]) -> Completion:
    """A passage with a question, and the first of its answers, as SQuAD has them."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts:
        raise RowProblem("answers must be an object whose text is a list of at least one answer")
    passage, question = (_string(row[key], key=key) for key in ("context", "question"))
    return Completion(f"{passage}\n\n{question}", _string(texts[0], key="answers.text[0]"))


def num_characters(example: Example) -> int:
    """Characters of content, without what a chat template adds."""
    if isinstance(example, Chat):
        return sum(len(message["content"]) for message in example.messages)
    return len(example.prompt) + len(example.completion) if isinstance(example, Completion) else len(example.text)


def row_hash(example: Example) -> int:
    """64-bit hash of what the row says: the same for rows that differ only in key order or in keys not read.

    Raises:
        RowProblem: the text holds half of a surrogate pair, which no tokenizer accepts.
    """
    if isinstance(example, Chat):
        content: Any = [example.messages, example.tools, example.first_learned]
    elif isinstance(example, Completion):
        content = {"prompt": example.prompt, "completion": example.completion}
    else:
        content = example.text
    try:
        data = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem("the text holds half of a UTF-16 surrogate pair (such as \\ud800); remove it") from error
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _messages(value: Any, *, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{key} must be a list of at least one message")
    return [_message(message, at=f"{key}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, *, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowProblem(f"{at} is a {type(value).__name__}, not an object with role and content")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise RowProblem(f"{at} has no role; known: {', '.join(ROLES)}")
    if role not in ROLES:
        raise RowProblem(f"{at} has the unknown role {role!r}{did_you_mean(role, ROLES)}")
    if role == "assistant" and message.get("tool_calls") and not message.get("content"):
        message["content"] = ""
        return message
    message["content"] = _content(message.get("content"), at=at)
    return message


def _content(value: Any, *, at: str) -> str:
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise RowProblem(f"{at}.content holds a part of type {kind!r}; only text parts can be learned")
        value = "".join(part["text"] for part in value)
    return _string(value, key=f"{at}.content")


def _string(value: Any, *, key: str) -> str:
    if value is None:
        raise RowProblem(f"{key} is null or missing")
    if not isinstance(value, str):
        raise RowProblem(f"{key} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise RowProblem(f"{key} is empty")
    return value


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem("tools must be a list of JSON schemas")
    return tools


def _require_assistant(messages: list[dict[str, Any]], *, key: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise RowProblem(f"{key} has no assistant turn, so there is nothing to learn")
