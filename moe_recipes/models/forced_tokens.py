"""A vLLM logits processor that makes every request decode the tokens that it was given. Only vLLM imports this file.

The engine's log-probabilities are taken before it, so decoding along a known row shows what the engine's decode path
thinks of every token of that row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ForcedTokens(AdapterLogitsProcessor):
    """``SamplingParams(extra_args={"forced_tokens": [...]})``: the next tokens of this request, in order."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        tokens = (params.extra_args or {}).get("forced_tokens")
        if not tokens:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(logits, float("-inf"))
            forced[tokens[len(output_ids)]] = 0.0
            return forced

        return force
