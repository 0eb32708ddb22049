"""Tokens of W&B and the Hugging Face hub, from a file that only its owner can read.

The file is read by the process that needs the tokens, inside the job, and handed to the trainer through its own
environment: command lines, submitted environments and scripts are seen by every user of a cluster. Each line is
``NAME=VALUE``; empty lines and lines that begin with ``#`` are skipped. No message of this module holds a value.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from moe_recipes.config.errors import SecretsError, did_you_mean

SECRET_NAMES = ("HF_TOKEN", "WANDB_API_KEY")
"""The names that a file may give, in the spelling of the libraries that read them."""

SHORTEST = 8
"""Characters. A shorter value is no token, and masking it would spoil ordinary text."""

_LARGEST_BYTES = 65536
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_VALUE = re.compile(r"[!#-&(-\[\]-~]+")
"""Printable ASCII without spaces, quotes and backslashes: the same text in a shell, in JSON and in a log."""


def read_secrets(path: str | Path) -> dict[str, str]:
    """The tokens of a file by name.

    Raises:
        SecretsError: the file is missing, is not a plain file, belongs to somebody else, can be read by others than its
            owner, or holds a line that is not a known name with a value.
    """
    place = Path(path).expanduser()
    secrets: dict[str, str] = {}
    for number, line in enumerate(_read_private(place).split("\n"), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, value = _parse(text, f"{place}:{number}")
        if name in secrets:
            raise SecretsError(f"{place}:{number}: {name} is there twice; keep one line")
        secrets[name] = value
    return secrets


def _read_private(place: Path) -> str:
    """The text of the file; mode and owner are those of the very file that is read, whatever the path names later."""
    try:
        # Without O_NONBLOCK a named pipe would stop the job here.
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SecretsError(
            f"{place}: cannot be read: {error.strerror}; make the file with mode 0600, or remove paths.secrets from the"
            " cluster file"
        ) from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise SecretsError(f"{place}: not a plain file; write the tokens into one with mode 0600")
        if facts.st_uid != os.geteuid():
            raise SecretsError(
                f"{place}: belongs to user {facts.st_uid}, but this process runs as {os.geteuid()}; use your own file"
            )
        if facts.st_mode & 0o177:
            mode = stat.S_IMODE(facts.st_mode)
            raise SecretsError(f"{place}: has mode {mode:04o}, others may read it; run: chmod 600 {place}")
        data = os.read(descriptor, _LARGEST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _LARGEST_BYTES:
        raise SecretsError(f"{place}: longer than {_LARGEST_BYTES} bytes; write one NAME=VALUE a line")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SecretsError(f"{place}:{line}: not plain ASCII text; write one NAME=VALUE a line") from None


def _parse(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    # A line that is no NAME=VALUE may be the token itself: it is never repeated.
    if not equals or not _NAME.fullmatch(name):
        raise SecretsError(
            f"{where}: not NAME=VALUE; write a line such as {SECRET_NAMES[0]}=..., without spaces or `export`"
        )
    if name not in SECRET_NAMES:
        raise SecretsError(f"{where}: unknown name {name}{did_you_mean(name, SECRET_NAMES)}")
    if not value:
        raise SecretsError(f"{where}: {name} has no value; write the token after the '=' or remove the line")
    if not _VALUE.fullmatch(value):
        raise SecretsError(
            f"{where}: the value of {name} has a quote, a space, a backslash or a control character; write it bare"
        )
    if len(value) < SHORTEST:
        raise SecretsError(f"{where}: the value of {name} is shorter than {SHORTEST} characters; write the whole token")
    return name, value


def mask(text: str, secrets: Mapping[str, str]) -> str:
    """The text with every value of ``secrets`` replaced by ``<NAME>``."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if value:
            text = text.replace(value, f"<{name}>")
    return text
