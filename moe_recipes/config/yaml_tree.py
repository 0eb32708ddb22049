"""YAML files as plain trees that remember the file and line of every key.

The values follow YAML 1.2: ``1e-5`` is a number, ``off`` is text, ``2024-01-01`` is text. PyYAML's own rules are those
of YAML 1.1, where the first is text, the second is false and the third is a date.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from moe_recipes.config.errors import RecipeError

KeyPath = tuple[str, ...]
RECIPE_SHAPE = "a recipe is a mapping of sections (model, data, optim, train, ...)"
FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
                  |[0-9][0-9_]*[eE][-+]?[0-9]+
                  |\.[0-9]+(?:[eE][-+]?[0-9]+)?
                  |\.(?:inf|Inf|INF))
         |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which YAML 1.2 reads as a number, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


@dataclass
class Tree:
    """Nested mappings, lists and scalars, and where each of them was written."""

    value: dict[str, Any]
    origin: str
    """The file, for keys that were written nowhere."""

    marks: dict[KeyPath, str] = field(default_factory=dict)
    """``file:line`` or the override, by key path."""

    def where(self, path: KeyPath) -> str:
        """Place of the key, else of the nearest section around it, else the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]]
        return self.origin

    def merge(self, other: Tree) -> None:
        """Put ``other`` over this tree: mappings merge key by key, everything else is replaced."""
        self._merge(self.value, other.value, (), other)

    def _merge(self, base: dict[str, Any], over: Mapping[str, Any], path: KeyPath, other: Tree) -> None:
        for key, value in over.items():
            inner = (*path, key)
            if inner in other.marks:
                self.marks[inner] = other.marks[inner]
            if isinstance(value, dict) and isinstance(base.get(key), dict):
                self._merge(base[key], value, inner, other)
                continue
            base[key] = value
            for marked, place in other.marks.items():
                if marked[: len(inner)] == inner:
                    self.marks[marked] = place


def parse_yaml(text: str, origin: str, *, lines: bool = True) -> tuple[Any, dict[KeyPath, str]]:
    """The plain value of one YAML document, and the place of every key.

    Args:
        origin: file name or override, the start of every error.
        lines: places are ``origin:line``; without it ``origin`` alone.
    Raises:
        RecipeError: not YAML, a key twice, a key that is not text, a value that contains itself.
    """
    marks: dict[KeyPath, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _plain(node, (), loader, origin if not lines else f"{origin}:", marks)), marks
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}:{mark.line + 1}" if mark is not None and lines else origin
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{place}: not valid YAML: {problem}") from error


def _plain(
    node: yaml.Node,
    path: KeyPath,
    loader: _Loader,
    prefix: str,
    marks: dict[KeyPath, str],
    around: tuple[int, ...] = (),
) -> Any:
    def place(at: yaml.Node) -> str:
        return f"{prefix}{at.start_mark.line + 1}" if prefix.endswith(":") else prefix

    if id(node) in around:
        raise RecipeError(f"{place(node)}: the value of {'.'.join(path)!r} contains itself through an anchor")
    around = (*around, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            marks[(*path, str(index))] = place(item)
        return [_plain(n, (*path, str(i)), loader, prefix, marks, around) for i, n in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node, deep=True)
        except ValueError as error:
            raise RecipeError(f"{place(node)}: {node.value!r} does not fit its tag {node.tag}") from error
    plain: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise RecipeError(f"{place(key_node)}: a key must be text; put quotes round it")
        inner = (*path, key)
        if key in plain:
            raise RecipeError(f"{place(key_node)}: key {'.'.join(inner)!r} is there twice; first in {marks[inner]}")
        marks[inner] = place(key_node)
        plain[key] = _plain(value_node, inner, loader, prefix, marks, around)
    return plain


def read_tree(path: Path, around: tuple[Path, ...] = (), *, shape: str = RECIPE_SHAPE) -> Tree:
    """A YAML file over the files that it ``extends``. ``name`` is the file's own, or its stem; it is not inherited.

    Args:
        shape: what the file should be, for the error where it is no mapping.
    Raises:
        RecipeError: a file is missing, unreadable, not YAML or not a mapping, or a chain of ``extends`` is a circle.
    """
    if path.resolve() in around:
        chain = " -> ".join(item.name for item in (*around, path))
        raise RecipeError(f"{path}: 'extends' runs in a circle: {chain}; remove one of them")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    value, marks = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {shape}")
    tree = Tree(value=value, origin=str(path), marks=marks)
    base_name = tree.value.pop("extends", None)
    if base_name is not None:
        if not isinstance(base_name, str):
            raise RecipeError(f"{tree.where(('extends',))}: 'extends' must be the path of one YAML file")
        base_path = path.parent / base_name
        if not base_path.is_file():
            raise RecipeError(f"{tree.where(('extends',))}: extends {base_name!r}, but there is no file {base_path}")
        base = read_tree(base_path, (*around, path.resolve()), shape=shape)
        base.value.pop("name", None)
        base.marks.pop(("name",), None)
        base.merge(tree)
        tree = Tree(value=base.value, origin=str(path), marks=base.marks)
    tree.value = {"name": tree.value.pop("name", path.stem), **tree.value}
    return tree


def write_yaml(value: Any) -> str:
    """YAML text that ``parse_yaml`` and any YAML 1.1 reader take back to the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
