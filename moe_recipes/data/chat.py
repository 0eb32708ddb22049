"""What a row says -> token ids and a loss mask.

The mask of a chat comes from the template's ``{% generation %}`` blocks where it has them. Without them it comes from
rendering the chat up to each assistant turn, and the turn's text must then be found in the whole chat at that place:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    |---- rendered up to the turn, with the prompt -----||-- learned --|     (the line break after the end token is not)

Both ways work on characters; a token is learned if it overlaps a learned character (Transformers' rule).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy as np

from moe_recipes.config.errors import DataError, first_line
from moe_recipes.data.shapes import Chat, Completion, Example, RowProblem, Text

_MARK = "\ue000"
"""A private-use character: no template writes it."""

_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Document:
    """One tokenized row. ``ids`` int32 ``[n]``; ``mask`` uint8 ``[n]``, 1 where the token is learned."""

    ids: np.ndarray
    mask: np.ndarray


class Encoder:
    """Tokenizes rows with a Hugging Face fast tokenizer.

    Args:
        loss_on: ``assistant`` (assistant turns or completions) or ``all``; plain text is always learned whole.
    Raises:
        DataError: the tokenizer gives no character offsets.
    """

    def __init__(self, tokenizer: Any, *, loss_on: str) -> None:
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise DataError(f"{name} gives no character offsets; use a tokenizer that has a tokenizer.json")
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self.has_generation = bool(self.template and re.search(r"\{%[-+]?\s*generation\b", self.template))
        self.end_tokens = tuple(str(token) for token in tokenizer.get_added_vocab())

    def encode(self, examples: Sequence[Example]) -> list[Document | RowProblem]:
        """A document, or what is wrong, for every example, in order.

        Raises:
            DataError: a chat needs a template and the tokenizer has none, or plain text an eos token.
        """
        prepared = [self._as_chat(example) for example in examples]
        out: list[Document | RowProblem | None] = [None] * len(prepared)
        chats, marked, texts = [], [], []
        for index, example in enumerate(prepared):
            if not isinstance(example, Chat):
                texts.append(index)
            elif self._template_marks(example):
                marked.append(index)
            else:
                chats.append(index)
        self._encode_marked(prepared, marked, out)
        self._encode_chats(prepared, chats, out)
        self._encode_texts(prepared, texts, out)
        return [document for document in out if document is not None]

    def _as_chat(self, example: Example) -> Example:
        if isinstance(example, Completion) and self.template is not None:
            turns = [("user", example.prompt), ("assistant", example.completion)]
            return Chat([{"role": role, "content": content} for role, content in turns], first_learned=1)
        if isinstance(example, Chat) and self.template is None:
            raise DataError(
                "the tokenizer has no chat template but the data are messages; set model.tokenizer to a chat model's"
                " tokenizer or add chat_template.jinja to its folder"
            )
        return example

    def _template_marks(self, chat: Chat) -> bool:
        if not self.has_generation or self.loss_on == "all":
            return False
        return not any(message["role"] == "assistant" for message in chat.messages[: chat.first_learned])

    def _encode_marked(self, examples: list[Any], indices: list[int], out: list[Any]) -> None:
        """Chats under a template with ``{% generation %}``: all that have no tools in one call, the others one by one.

        If the call fails, one by one too, to find the bad row.
        """
        with_tools = [index for index in indices if examples[index].tools is not None]
        if with_tools and len(indices) > 1:
            self._encode_marked(examples, [index for index in indices if index not in set(with_tools)], out)
            for index in with_tools:
                self._encode_marked(examples, [index], out)
            return
        if not indices:
            return
        try:
            documents: list[Document | RowProblem] = self._apply_template([examples[index] for index in indices])
        except _TEMPLATE_ERRORS as error:
            if len(indices) > 1:
                for index in indices:
                    self._encode_marked(examples, [index], out)
                return
            documents = [_template_problem(error)]
        for index, document in zip(indices, documents, strict=True):
            if isinstance(document, Document) and not document.mask.any():
                document = RowProblem("the chat template's {% generation %} marks no token of this chat")
            out[index] = document

    def _apply_template(self, chats: list[Any]) -> list[Document | RowProblem]:
        encoded = self.tokenizer.apply_chat_template(
            [chat.messages for chat in chats],
            tools=chats[0].tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return [Document(np.array(ids, np.int32), np.array(mask, np.uint8)) for ids, mask in pairs]

    def _encode_chats(self, examples: list[Any], indices: list[int], out: list[Any]) -> None:
        """Chats whose learned characters are found by rendering."""
        rendered: list[tuple[int, str, list[tuple[int, int]]]] = []
        for index in indices:
            try:
                text, spans = self._rendered_spans(examples[index])
                rendered.append((index, text, spans))
            except RowProblem as problem:
                out[index] = problem
            except _TEMPLATE_ERRORS as error:
                out[index] = _template_problem(error)
        if rendered:
            texts, spans_of_texts = [text for _, text, _ in rendered], [spans for *_, spans in rendered]
            documents = self._tokenize(texts, spans_of_texts, special=False)
            for (index, *_), document in zip(rendered, documents, strict=True):
                out[index] = document

    def _render(self, chat: Chat, num_messages: int, *, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat.messages[:num_messages], tools=chat.tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def _rendered_spans(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """The whole chat, and the ``[start, end)`` characters of its learned turns."""
        whole = self._render(chat, len(chat.messages))
        if self.loss_on == "all":
            return whole, [(0, len(whole))]
        spans = []
        for index, message in enumerate(chat.messages):
            if message["role"] != "assistant" or index < chat.first_learned:
                continue
            if index == 0:
                raise RowProblem("the chat starts with an assistant turn; put a user turn first")
            start = self._start_of_turn(chat, index, whole)
            end = self._end_of_turn(chat, index, whole, start)
            if end is None:
                raise RowProblem(
                    f"the chat template renders messages[{index}] differently once more turns follow, so its tokens"
                    f" cannot be told apart; mark assistant turns with {{% generation %}} in the template"
                    f" or set data.loss_on=all"
                )
            spans.append((start, end))
        return whole, spans

    def _start_of_turn(self, chat: Chat, index: int, whole: str) -> int:
        """Characters of ``whole`` that the generation prompt covers; what a turn adds to it is learned."""
        prompt = self._render(chat, index, prompt=True)
        if whole.startswith(prompt):
            return len(prompt)
        # The prompt opens a thought that the turn does not have. They part where the turn's own text would begin,
        # which a mark in its place shows, even if the text starts with the same characters as the prompt goes on.
        messages = list(chat.messages)
        messages[index] = {**messages[index], "content": _MARK}
        marked = self._render(replace(chat, messages=messages), len(messages))
        pairs = enumerate(zip(prompt, marked, strict=False))
        return next((at for at, (one, other) in pairs if one != other), min(len(prompt), len(marked)))

    def _end_of_turn(self, chat: Chat, index: int, whole: str, start: int) -> int | None:
        """Where the turn's learned characters end in ``whole``; None if the turn is not found at ``start``."""
        before, through = self._render(chat, index), self._render(chat, index + 1)
        if start < len(before) or not through.startswith(whole[:start]):
            return None
        turn = through[start:]
        content = chat.messages[index]["content"].split("</think>")[-1].strip()
        if content not in turn:
            raise RowProblem(f"the chat template leaves out the content of messages[{index}]")
        if not whole.startswith(turn, start):
            # Templates of reasoning models write an (empty) thought only into the newest turn: look for the turn's own
            # text directly after the prompt, followed by what closes a turn.
            tails = [turn[match.start() :] for match in re.finditer(re.escape(content), turn)] if content else []
            turn = next((tail for tail in tails if whole.startswith(tail, start)), "")
            if not turn:
                return None
        trimmed = turn.rstrip()
        return start + len(trimmed if trimmed.endswith(self.end_tokens) else turn)

    def _encode_texts(self, examples: list[Any], indices: list[int], out: list[Any]) -> None:
        """Plain text, and completions for a tokenizer without chat template; an eos token ends each document."""
        if not indices:
            return
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no token to end a text with; set eos_token in its tokenizer_config.json")
        texts, spans = [], []
        for example in (examples[index] for index in indices):
            text = example.text if isinstance(example, Text) else example.prompt + example.completion
            learned_from = len(example.prompt) if isinstance(example, Completion) and self.loss_on == "assistant" else 0
            texts.append(text)
            spans.append([(learned_from, len(text))])
        for index, document in zip(indices, self._tokenize(texts, spans, special=True), strict=True):
            if isinstance(examples[index], Text) or self.loss_on == "all":
                document.mask[:] = 1
            if document.ids[-1:].tolist() == [eos]:
                document.mask[-1] = 1
            else:
                document = Document(np.append(document.ids, np.int32(eos)), np.append(document.mask, np.uint8(1)))
            out[index] = document

    def _tokenize(self, texts: list[str], spans: list[list[tuple[int, int]]], *, special: bool) -> list[Document]:
        encoded = self.tokenizer(
            texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        documents = []
        for ids, offsets, learned in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
            mask = np.zeros(len(ids), np.uint8)
            for first, last in learned:
                mask |= ((starts < last) & (ends > first)).astype(np.uint8)
            documents.append(Document(np.array(ids, np.int32), mask))
        return documents


def _template_problem(error: Exception) -> RowProblem:
    reason = first_line(error)
    return RowProblem(f"the chat template refuses this chat: {reason}")
