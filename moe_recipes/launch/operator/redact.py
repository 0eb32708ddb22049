"""Take secrets out of text: the values that are known here, and whatever looks like a key."""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from netrc import NetrcParseError, netrc
from pathlib import Path

from moe_recipes.launch.secrets import SECRET_NAMES, SHORTEST, mask

PATTERNS = {
    "Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "W&B key": re.compile(r"\bwandb_v\d+_[A-Za-z0-9_]+"),
    "40 hex digits": re.compile(r"(?<![0-9A-Fa-f])[0-9A-Fa-f]{40}(?![0-9A-Fa-f])"),
    "AWS key id": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub or GitLab token": re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}"),
    "OpenAI-like key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "NGC key": re.compile(r"\bnvapi-[A-Za-z0-9_-]{20,}"),
    "JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    "private key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
    ),
}
"""What is a key by its look alone: the whole match goes."""

NAMED = {
    "authorization": re.compile(r"(?i)(\b(?:bearer|basic)\s+)([A-Za-z0-9._~+/=-]{8,})"),
    "password in an address": re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)([^\s/@]+)(?=@)"),
    "named secret": re.compile(
        r"(?i)((?:api_?key|access_?key|access_?key_?id|token|secret|passw(?:or)?d|credential)s?"
        r"[\"']?\s*(?:[=:]|\s)\s*[\"']?)(?=[^\s\"',;}]*[A-Za-z])(?=[^\s\"',;}]*\d)([^\s\"',;}<]{12,})"
    ),
}
"""What is a secret by the words before it: they stay. A named secret has letters and digits, 12 characters or more."""


class Redactor:
    """Masks text and counts what it masked, by kind."""

    def __init__(self, secrets: Mapping[str, str], keep: Iterable[str] = ()) -> None:
        """``keep``: commits that are known to be commits, and would look like keys of W&B."""
        self.secrets = {**secrets, **_encoded(secrets)}
        self.keep = frozenset(word.lower() for word in keep)
        self.masked: Counter[str] = Counter()

    def __call__(self, text: str) -> str:
        for name, value in self.secrets.items():
            self.masked[name] += text.count(value)
        text = mask(text, self.secrets)
        for kind, pattern in PATTERNS.items():
            text = pattern.sub(partial(self._mask, kind, 0), text)
        for kind, pattern in NAMED.items():
            text = pattern.sub(partial(self._mask, kind, 2), text)
        return text

    def _mask(self, kind: str, secret: int, match: re.Match[str]) -> str:
        """The match with its group ``secret`` replaced; 0 is all of it."""
        if match[secret].lower() in self.keep:
            return match[0]
        self.masked[kind] += 1
        return f"{match[1] if secret else ''}<{kind}>"


def _encoded(secrets: Mapping[str, str]) -> dict[str, str]:
    """The forms in which a client sends a key: ``api:KEY`` in base64, as W&B's does."""
    return {
        f"{name} in base64": base64.b64encode(f"{user}{value}".encode()).decode().rstrip("=")
        for name, value in secrets.items()
        for user in ("api:",)
    }


def secrets_at_hand(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Tokens of this user: of the environment, of ``~/.netrc`` and of the Hugging Face login."""
    found = {name: environ[name] for name in SECRET_NAMES if len(environ.get(name, "")) >= SHORTEST}
    home = Path(environ.get("HOME", "/nonexistent"))
    try:
        hosts = netrc(str(home / ".netrc")).hosts
    except (OSError, NetrcParseError):
        hosts = {}
    found |= {f"netrc {host}": password for host, (_, _, password) in hosts.items() if password}
    hf_home = Path(environ.get("HF_HOME") or home / ".cache" / "huggingface")
    try:
        token = (hf_home / "token").read_text().strip()
    except OSError:
        token = ""
    return found | ({"Hugging Face login": token} if len(token) >= SHORTEST else {})
