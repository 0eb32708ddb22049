"""docs/commands.md and docs/runbook.md agree with the code: every verb, every command line, every page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moe_recipes.launch.cli import VERBS, make_parser
from moe_recipes.launch.operator.why import PAGES

DOCS = Path(__file__).resolve().parents[2] / "docs"
LINE = re.compile(r"(?:^\$ |^|\| `)moe-recipes ([a-z][a-z-]* [^`\n]*)", re.MULTILINE)
"""A command of its own line, or of the last column of a table."""


def command_lines(name: str) -> list[str]:
    text = (DOCS / name).read_text()
    return [re.split(r"\s{2,}#| && | \| ", line)[0].strip() for line in LINE.findall(text)]


def test_every_verb_has_an_example_that_names_it() -> None:
    lines = command_lines("commands.md")
    assert {line.split()[0] for line in lines} == set(VERBS)


@pytest.mark.parametrize("name", ["commands.md", "runbook.md"])
def test_every_command_line_is_one_that_the_parser_takes(name: str) -> None:
    lines = command_lines(name)
    assert len(lines) > 12
    for line in lines:
        words = shlex.split(line)
        options = make_parser(words[0]).parse_args(words)
        assert options.verb == words[0], line


def test_the_pages_that_why_names_are_in_the_runbook() -> None:
    titles = {
        line.removeprefix("## ").lower() for line in (DOCS / "runbook.md").read_text().splitlines() if "## " in line
    }
    assert set(PAGES.values()) <= titles
