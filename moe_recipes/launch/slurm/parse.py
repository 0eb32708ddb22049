"""The text forms in which Slurm's commands answer."""

from __future__ import annotations

import re
from datetime import datetime

NOTHING = ("", "(null)", "None", "N/A", "Unknown", "None assigned")


def pairs(text: str) -> dict[str, str]:
    """``Key=value`` of scontrol; the first of two equal keys, and a value may hold spaces up to the next key."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        found = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z:/]*)=", line))
        for match, following in zip(found, [*found, None][1:], strict=True):
            value = line[match.end() : following.start() if following else None].strip()
            values.setdefault(match[1], value)
    return values


def or_none(text: str) -> str | None:
    return None if text in NOTHING else text


def epoch(text: str) -> float | None:
    """Slurm prints local time without a zone; this host's zone is the cluster's."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def limit_s(text: str) -> int | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
