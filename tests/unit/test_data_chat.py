"""The loss mask, checked as text: what a chat's learned tokens say, in every way a mask is found."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from moe_recipes.config.errors import DataError
from moe_recipes.data.chat import Document, Encoder
from moe_recipes.data.shapes import RowProblem, parse_row, shape_of
from tests.unit.data_tools import PLAIN_CHATML, chat, learned_runs, make_tokenizer

# As Qwen3's: the newest assistant turn gets an (empty) thought, older ones none.
THINKS_IN_LAST_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Nemotron 3's: the prompt opens a thought in one way, a turn without thought writes another.
PROMPT_OPENS_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
# The end of a turn depends on what follows, as GPT-OSS's: cannot be told apart by rendering.
END_DEPENDS_ON_NEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DROPS_CONTENT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n<|im_end|>\\n' }}{% endfor %}"
REFUSES = "{{ raise_exception('roles must alternate') }}"


def encode(row, *, template="generation", loss_on="assistant"):
    """``(tokenizer, document or problem)`` of one row."""
    tokenizer = make_tokenizer(template)
    example = parse_row(row, shape=shape_of(row, shape="auto"))
    return tokenizer, Encoder(tokenizer, loss_on=loss_on).encode([example])[0]


def learned(row, **how) -> list[str]:
    tokenizer, document = encode(row, **how)
    assert isinstance(document, Document), document
    return learned_runs(tokenizer, document.ids, document.mask)


TWO_TURNS = chat("the cat?", "sat on", "and the dog?", "end\n\nof <b>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("generation", ["sat on<|im_end|>", "end\n\nof <b><|im_end|>"]),
        (PLAIN_CHATML, ["sat on<|im_end|>", "end\n\nof <b><|im_end|>"]),
        (THINKS_IN_LAST_TURN, ["sat on<|im_end|>", "<think>\n\n</think>\n\nend\n\nof <b><|im_end|>"]),
        (PROMPT_OPENS_THOUGHT, ["</think>sat on<|im_end|>", "</think>end\n\nof <b><|im_end|>"]),
    ],
)
def test_only_assistant_turns_are_learned(template, expected):
    assert learned(TWO_TURNS, template=template) == expected


def test_answer_that_begins_like_the_prompts_thought_is_learned_whole():
    template = THINKS_IN_LAST_TURN.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}")
    template = template.replace("and loop.last", "and false")
    assert learned(chat("the cat?", "<b>sat"), template=template) == ["<b>sat<|im_end|>"]


def test_both_ways_give_the_same_tokens_and_mask():
    row = {"messages": [{"role": "system", "content": "the mat"}, *TWO_TURNS["messages"]]}
    _, marked = encode(row)
    _, rendered = encode(row, template=PLAIN_CHATML)
    assert marked.ids.tolist() == rendered.ids.tolist()
    assert marked.mask.tolist() == rendered.mask.tolist()


def test_tokens_are_those_of_the_chat_template():
    tokenizer, document = encode(TWO_TURNS)
    text = (
        "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nsat on<|im_end|>\n"
        "<|im_start|>user\nand the dog?<|im_end|>\n<|im_start|>assistant\nend\n\nof <b><|im_end|>\n"
    )
    assert tokenizer.decode(document.ids) == text


def test_many_rows_come_back_in_order_with_the_bad_one_named():
    tokenizer = make_tokenizer("{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
                               + make_tokenizer().chat_template)  # fmt: skip
    rows = [chat("a", "one"), TWO_TURNS, chat("b", "two")]
    out = Encoder(tokenizer, loss_on="assistant").encode([parse_row(row, shape="messages") for row in rows])
    assert learned_runs(tokenizer, out[0].ids, out[0].mask) == ["one<|im_end|>"]
    assert isinstance(out[1], RowProblem)
    assert "too many turns" in str(out[1])
    assert learned_runs(tokenizer, out[2].ids, out[2].mask) == ["two<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (END_DEPENDS_ON_NEXT, "mark assistant turns with {% generation %}"),
        (DROPS_CONTENT, "leaves out the content of messages[1]"),
        (REFUSES, "roles must alternate"),
        ("{% generation %}{% endgeneration %}x", "marks no token"),
    ],
)
def test_template_that_cannot_be_masked_is_refused(template, words):
    _, problem = encode(TWO_TURNS, template=template)
    assert isinstance(problem, RowProblem)
    assert words in str(problem)


@pytest.mark.parametrize("template", ["generation", PLAIN_CHATML])
def test_loss_on_all_learns_every_token(template):
    assert all(encode(TWO_TURNS, template=template, loss_on="all")[1].mask)


@pytest.mark.parametrize("template", ["generation", PLAIN_CHATML])
def test_completion_goes_through_the_chat_template(template):
    row = {"prompt": "the cat", "completion": "sat"}
    assert learned(row, template=template) == ["sat<|im_end|>"]
    tokenizer, document = encode(row, template=template)
    assert tokenizer.decode(document.ids).startswith("<|im_start|>user\nthe cat<|im_end|>")


@pytest.mark.parametrize("template", ["generation", PLAIN_CHATML])
def test_assistant_turns_of_a_prompt_are_context(template):
    row = {"prompt": chat("a", "not this", "b")["messages"], "completion": [{"role": "assistant", "content": "this"}]}
    assert learned(row, template=template) == ["this<|im_end|>"]


def test_completion_without_template_is_concatenated():
    row = {"prompt": "the cat", "completion": " sat"}
    assert learned(row, template=None) == [" sat<|im_end|>"]
    tokenizer, document = encode(row, template=None)
    assert tokenizer.decode(document.ids) == "the cat sat<|im_end|>"
    assert all(encode(row, template=None, loss_on="all")[1].mask)


def test_text_is_learned_whole_and_ended_once():
    for text in ("the cat", "the cat<|im_end|>"):
        assert learned({"text": text}, template=None) == ["the cat<|im_end|>"]


def test_text_keeps_the_tokenizers_own_special_tokens():
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    text, completion = (
        Encoder(tokenizer, loss_on="assistant").encode([parse_row(row, shape=shape_of(row, shape="auto"))])[0]
        for row in ({"text": "the cat"}, {"prompt": "the cat", "completion": " sat"})
    )
    assert tokenizer.decode(text.ids) == "<|im_start|>the cat<|im_end|>"
    assert all(text.mask)
    assert tokenizer.decode(completion.ids) == "<|im_start|>the cat sat<|im_end|>"
    assert learned_runs(tokenizer, completion.ids, completion.mask) == [" sat<|im_end|>"]


def test_text_parts_are_joined():
    row = chat("a", "b")
    row["messages"][1]["content"] = [{"type": "text", "text": "sat "}, {"type": "text", "text": "on"}]
    assert learned(row) == ["sat on<|im_end|>"]


def test_tool_call_without_content_is_a_turn_and_tools_reach_the_template():
    template = "{{ tools[0].name if tools else 'no tools' }}" + make_tokenizer().chat_template.replace(
        "message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "message['content'] + (message.tool_calls[0].name if message.tool_calls else '') + '<|im_end|>' }}"
        "{% endgeneration %}",
    )
    row = {
        "tools": [{"name": "find"}],
        "messages": [
            {"role": "user", "content": "where?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]},
            {"role": "tool", "content": "the mat"},
            {"role": "assistant", "content": "on the mat"},
        ],
    }
    assert learned(row, template=template) == ["find<|im_end|>", "on the mat<|im_end|>"]
    tokenizer, document = encode(row, template=template)
    assert tokenizer.decode(document.ids).startswith("find<|im_start|>user")


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(DataError, match="no chat template but the data are messages"):
        encode(TWO_TURNS, template=None)


def test_text_without_an_eos_token_is_refused():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="set eos_token"):
        Encoder(tokenizer, loss_on="assistant").encode([parse_row({"text": "the"}, shape="text")])
