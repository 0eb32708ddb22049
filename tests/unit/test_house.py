"""The house rules that a tool or a count can hold: lengths, plain text, docs that agree with the code, set-up."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import moe_recipes
from moe_recipes.config import errors
from moe_recipes.config.recipe import Recipe
from moe_recipes.runtime.versions import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted((ROOT / "moe_recipes").rglob("*.py"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
BINARY = {".png", ".safetensors", ".parquet", ".gz", ".xz"}


def kept_files() -> list[Path]:
    """Files that git keeps or would keep."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_files() -> dict[str, bytes]:
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in kept_files() if p.suffix not in BINARY}


def table_of(path: Path, header: str) -> list[list[str]]:
    """Rows of the first table of a Markdown file whose header line starts with ``header``; code marks removed."""
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def test_files_and_functions_are_short() -> None:
    long = []
    for path in CODE:
        source = path.read_text()
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert len(CODE) > 30
    assert long == []


def test_text_is_ascii_and_speaks_of_this_project_only() -> None:
    files = text_files()
    assert len(files) > 50
    assert [name for name, data in files.items() if not data.isascii()] == []
    # Put together from parts, so that this file passes its own test.
    parts = [("/", "work/"), ("/tmp", "/v/"), ("files.python", "hosted"), ("pypi.org", "/simple"), ("/opt", "/pypi")]
    parts += [("deb.deb", "ian.org"), ("registry.npm", "js"), ("TO", "DO:"), ("FIX", "ME")]
    words = ["".join(part).encode() for part in parts]
    found = {name: word for name, data in files.items() for word in words if word in data}
    assert found == {}


def test_supported_versions_in_the_docs_are_those_of_the_code() -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "install.md"):
        rows = {row[0]: tuple(row[1:3]) for row in table_of(path, "| package | first supported")}
        assert rows == SUPPORTED, path


def test_supported_versions_fit_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={SUPPORTED['python'][0]}"
    assert f"torch>={SUPPORTED['torch'][0]}" in project["dependencies"]
    assert "transformers>={},<{}".format(*SUPPORTED["transformers"]) in project["dependencies"]


def test_every_recipe_key_is_documented_with_its_default() -> None:
    documented = {}
    for line in (ROOT / "docs" / "recipes.md").read_text().splitlines():
        if match := re.match(r"\| `([\w.]+)` \| (?:`(.*?)`|([^|]*)) \| [^|]+ \| (.+) \|$", line):
            assert match[4] != "MISSING"
            documented[match[1]] = match[2] if match[2] is not None else match[3]
    defaults = {}
    for prefix, kind in [("", Recipe), *((f"{n}.", k) for n, k in typing.get_type_hints(Recipe).items())]:
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if dataclasses.is_dataclass(typing.get_type_hints(kind)[field.name]):
                continue
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            defaults[prefix + field.name] = "required" if default is dataclasses.MISSING else json.dumps(default)
    assert len(defaults) > 40
    assert documented == {**defaults, "name": "the file's stem"}


def test_links_in_the_docs_lead_to_files() -> None:
    broken = []
    for path in DOCS:
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            if "://" not in link and not (path.parent / link).exists():
                broken.append(f"{path.name}: {link}")
    assert len(DOCS) > 6
    assert broken == []


def test_tests_and_files_named_in_the_docs_exist() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    known = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    known |= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    text = "\n".join(path.read_text() for path in DOCS)
    assert set(re.findall(r"\btest_\w+", text)) - known == set()
    rooms = "config|plan|launch|runtime|kernels|moe|models|data|checkpoint|train|prove|bench"
    named = set(re.findall(rf"(?<![\w/.])(?:moe_recipes/)?((?:{rooms})/\w+\.py)", text))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / "moe_recipes" / name).is_file()] == []


def test_exit_codes_are_documented() -> None:
    used = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    for path in (ROOT / "README.md", ROOT / "docs" / "bad-input.md"):
        codes = {int(row[0]) for row in table_of(path, "| code | meaning")}
        assert used | {errors.EXIT_OK} <= codes, path


def test_every_measurement_is_linked() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert [path.name for path in sorted((ROOT / "benchmarks").glob("*.json")) if path.name not in text] == []


def test_every_recipe_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in sorted((ROOT / "recipes").glob("*.yaml")) if f"recipes/{path.name}" not in text] == []


def test_the_version_is_written_once() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "moe_recipes.__version__"}
    quoted = (f'"{moe_recipes.__version__}"', f"'{moe_recipes.__version__}'")
    assert [p.name for p in CODE if any(q in p.read_text() for q in quoted)] == ["__init__.py"]


def test_imports_point_down() -> None:
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    call = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", call, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_make_with_an_empty_venv_installs_nothing_even_in_a_folder_with_a_space(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    clone = tmp_path / "a clone"
    clone.mkdir()
    shutil.copy(ROOT / "Makefile", clone)
    shutil.copy(ROOT / "pyproject.toml", clone)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@" >>"$CALLS"\n')
    python.chmod(0o755)
    environment = {**os.environ, "CALLS": str(tmp_path / "calls"), "PYTHONPATH": "/elsewhere"}
    for name in ("MAKEFLAGS", "MAKELEVEL", "VENV", "PYTHON"):
        environment.pop(name, None)
    command = ["make", "demo", f"PYTHON={python}", "VENV="]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "calls").read_text().splitlines()
    assert said == [f"{clone}:/elsewhere", "-m", "moe_recipes.launch.demo"]
    assert not (clone / ".venv").exists()


def test_ci_script_is_whole_and_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
