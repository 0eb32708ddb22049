"""Errors that a user can mend, each with the exit code that the operator's scripts act on.

A user error is one line: what is wrong, where, and how to mend it. The command line prints it without a
traceback and exits with ``exit_code``. Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

EXIT_OK = 0
EXIT_NOT_FINITE = 17
EXIT_DOES_NOT_FIT = 20
EXIT_RECIPE = 64
EXIT_DATA = 65
EXIT_MISSING_INPUT = 66
EXIT_INFRASTRUCTURE = 69
EXIT_INTERNAL = 70
EXIT_CANNOT_WRITE = 73
EXIT_CORRUPT_CHECKPOINT = 74
EXIT_REQUEUE = 75
EXIT_SECRETS = 77
EXIT_ENVIRONMENT = 78
EXIT_DO_NOT_REQUEUE = 93

DISK_TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class MoeRecipesError(Exception):
    """Base of every error that is the user's or the machine's, not a bug."""

    exit_code = EXIT_INTERNAL


class NotFiniteError(MoeRecipesError):
    """The loss or the gradient norm is not finite, or a validation failed."""

    exit_code = EXIT_NOT_FINITE


class DoesNotFitError(MoeRecipesError):
    """The run needs more device memory than there is."""

    exit_code = EXIT_DOES_NOT_FIT


class RecipeError(MoeRecipesError, ValueError):
    """The recipe, an override or the command line is wrong."""

    exit_code = EXIT_RECIPE


class DataError(MoeRecipesError, ValueError):
    """A data file holds something that cannot be learned from as asked."""

    exit_code = EXIT_DATA


class MissingInputError(MoeRecipesError):
    """A file, folder or shard that the run needs is not there."""

    exit_code = EXIT_MISSING_INPUT


class InfrastructureError(MoeRecipesError):
    """A rank, a node or the network failed."""

    exit_code = EXIT_INFRASTRUCTURE


class CannotWriteError(MoeRecipesError):
    """An output folder or file cannot be written."""

    exit_code = EXIT_CANNOT_WRITE


class CorruptCheckpointError(MoeRecipesError):
    """A checkpoint or model file is incomplete or damaged, or belongs to another run."""

    exit_code = EXIT_CORRUPT_CHECKPOINT


class SecretsError(MoeRecipesError):
    """The file of secrets is missing, others may read it, or it does not hold what it should."""

    exit_code = EXIT_SECRETS


class EnvironmentMismatchError(MoeRecipesError):
    """Python, torch or another package is missing or outside the supported range."""

    exit_code = EXIT_ENVIRONMENT


class StoppedError(MoeRecipesError):
    """A signal asked the run to stop; it saved and can be started again."""

    exit_code = EXIT_REQUEUE


class OtherRankError(MoeRecipesError):
    """What another rank met; ``exit_code`` and the message are that rank's, so that all ranks end alike."""

    def __init__(self, message: str, *, rank: int, exit_code: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """The error's own code; 73 for an ``OSError`` of a disk that takes no more bytes; else 70, a bug."""
    if isinstance(error, OSError) and error.errno in DISK_TAKES_NO_MORE:
        return EXIT_CANNOT_WRITE
    return error.exit_code if isinstance(error, MoeRecipesError) else EXIT_INTERNAL


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line; its class where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest known word, else the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
