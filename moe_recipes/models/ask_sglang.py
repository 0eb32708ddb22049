"""Asks SGLang for its log-probabilities: ``python -m moe_recipes.models.ask_sglang QUESTION ANSWER``, both JSON files.

Only ``check_engines`` starts it. The question has ``export``, ``dtype``, ``rows`` of tokens, ``top_tokens`` and
``options`` of ``sglang.Engine``. The answer has three views of each row, from the place in the row to the tokens and
log-probabilities of what comes next: ``prefill`` of the row, ``stepwise`` of its first half and the engine's own greedy
continuation of it, decoded token by token, and ``again``, that same text read as a prompt.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

Views = dict[int, dict[int, float]]


def ask(engine: Any, tokens: list[int], *, max_new_tokens: int, top_tokens: int) -> tuple[Views, list[int]]:
    """What the engine thinks at every place of ``tokens`` and of what it adds to them; and what it adds."""
    answer = engine.generate(
        input_ids=tokens,
        sampling_params={"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=top_tokens,
    )
    said = answer["meta_info"]
    tops = said["input_top_logprobs"] + said["output_top_logprobs"]
    chosen = said["input_token_logprobs"] + said["output_token_logprobs"]
    # What it says of token i is its view after token i - 1; the first token has none.
    views = {
        place - 1: {int(token): float(value) for value, token, *_ in [*top, own]}
        for place, (top, own) in enumerate(zip(tops, chosen, strict=True))
        if top
    }
    return views, list(answer["output_ids"])


def main() -> None:
    import sglang

    question, answer = (Path(word) for word in sys.argv[1:3])
    asked = json.loads(question.read_text())
    rows, top_tokens = asked["rows"], asked["top_tokens"]
    half = len(rows[0]) // 2
    engine = sglang.Engine(
        model_path=asked["export"],
        dtype=asked["dtype"],
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        disable_radix_cache=True,
        context_length=len(rows[0]) + 8,
        log_level="error",
        **asked["options"],
    )
    try:
        answers = []
        for row in rows:
            prefill, _ = ask(engine, row, max_new_tokens=1, top_tokens=top_tokens)
            stepwise, added = ask(engine, row[:half], max_new_tokens=len(row) - half, top_tokens=top_tokens)
            again, _ = ask(engine, row[:half] + added, max_new_tokens=1, top_tokens=top_tokens)
            answers.append({"prefill": prefill, "stepwise": stepwise, "again": again})
        answer.write_text(json.dumps(answers))
    finally:
        engine.shutdown()
        for process in multiprocessing.active_children():  # some outlive it, and Python would wait for them for ever
            process.kill()


if __name__ == "__main__":
    main()
