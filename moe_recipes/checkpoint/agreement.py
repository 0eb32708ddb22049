"""Ranks that act together: all go on, or all fail with the same message.

The only channel is ``agree(flag) -> bool``, true if the flag is true on every rank (one small all-reduce on the CPU
group). A rank that speaks alone sends bits through it: ``agree(bit)`` there and ``agree(True)`` elsewhere. That is
slow, about a thousand small reductions for an error message, and runs only when a save has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from moe_recipes.config.errors import CannotWriteError, InfrastructureError

T = TypeVar("T")

MAX_MESSAGE_BYTES = 400


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """This rank's voice among ``num_ranks``. Every method is collective."""

    agree: Callable[[bool], bool]
    rank: int
    num_ranks: int

    def share_int(self, value: int, *, speaker: bool, bits: int) -> int:
        """The speaker's value, on every rank. Exactly one rank speaks; the values of the others are ignored."""
        shared = 0
        for bit in range(bits):
            shared |= int(self.agree(not speaker or bool(value >> bit & 1))) << bit
        return shared

    def first_rank(self, candidate: bool) -> int:
        """The lowest rank that is a candidate; at least one must be."""
        found, bits = 0, max(1, (self.num_ranks - 1).bit_length())
        for bit in reversed(range(bits)):
            is_one = self.agree(not candidate or bool(self.rank >> bit & 1))
            candidate = candidate and bool(self.rank >> bit & 1) == is_one
            found |= int(is_one) << bit
        return found

    def share_text(self, text: str, *, speaker: bool) -> str:
        raw = text.encode()[:MAX_MESSAGE_BYTES]
        size = self.share_int(len(raw), speaker=speaker, bits=MAX_MESSAGE_BYTES.bit_length())
        whole = self.share_int(int.from_bytes(raw, "little"), speaker=speaker, bits=8 * size)
        return whole.to_bytes(size, "little").decode(errors="replace")

    def act(self, action: Callable[[], T], *, undo: Callable[[], None]) -> T:
        """Run ``action`` on this rank; return its result if it succeeded on every rank, else ``undo`` and raise.

        Raises:
            CannotWriteError: on every rank, if the first rank that failed did so with an ``OSError``; it names
                that rank, the file and the reason.
            InfrastructureError: on the other ranks, if it failed otherwise; the failing rank raises its own error.
        """
        error: Exception | None = None
        result = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        if self.agree(error is None):
            return result  # type: ignore[return-value]
        speaker = self.first_rank(error is not None) == self.rank
        writing = bool(self.share_int(int(isinstance(error, OSError)), speaker=speaker, bits=1))
        text = self.share_text(f"rank {self.rank} {describe(error)}", speaker=speaker)
        undo()
        if error is not None and not isinstance(error, OSError):
            raise error
        if writing:
            raise CannotWriteError(
                f"{text}; make room or mend the permissions and start again: older checkpoints are untouched"
            ) from error
        raise InfrastructureError(f"the checkpoint was not saved: {text}") from error


def describe(error: Exception | None) -> str:
    if isinstance(error, OSError):
        return f"cannot write {error.filename}: {error.strerror or error}"
    return f"failed with {type(error).__name__}: {error}"
