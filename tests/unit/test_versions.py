"""What cannot work is refused at the start, what was not tried is a warning."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError

import pytest

from moe_recipes.config.errors import EnvironmentMismatchError
from moe_recipes.runtime import versions


def check(monkeypatch: pytest.MonkeyPatch, **installed: str | None) -> None:
    def version(package: str) -> str:
        found = {"torch": "2.11.0", "transformers": "5.24.3", **installed}[package]
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(versions, "version", version)
    versions.check_versions()


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.10.1"}, r"torch 2\.10\.1 is outside the supported range >=2\.11,<2\.15; install"),
        ({"transformers": "5.23.9"}, r"transformers 5\.23\.9 is outside the supported range >=5\.24,<5\.25; install"),
        ({"transformers": "5.25.0"}, r"transformers 5\.25\.0 is outside"),
        ({"torch": None}, r"torch is not installed; needed: >=2\.11,<2\.15"),
    ],
)
def test_refused(monkeypatch, installed, said):
    with pytest.raises(EnvironmentMismatchError, match=said):
        check(monkeypatch, **installed)


def test_a_newer_torch_is_a_warning(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="moe_recipes"):
        check(monkeypatch, torch="2.11.0+cu130")
        assert caplog.text == ""
        check(monkeypatch, torch="2.99.0")
    assert "torch 2.99.0 is newer than what was tested (<2.15)" in caplog.text
