"""Recipe files and overrides to a ``Recipe``, strictly: nothing unknown, nothing cast, nothing dropped."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from moe_recipes.config.errors import RecipeError, did_you_mean
from moe_recipes.config.recipe import Recipe
from moe_recipes.config.yaml_tree import KeyPath, Tree, parse_yaml, read_tree, write_yaml

RECIPE_FOLDERS = (Path("recipes"), Path(__file__).resolve().parents[2] / "recipes")
T = TypeVar("T")
_KINDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with overrides on top. Rules over several keys are ``checks.check_recipe``'s.

    Args:
        path: a file, or a bare name that is looked up in ``./recipes`` and in this project's ``recipes``.
        overrides: ``section.key=value``, the value in YAML; a later one wins.
    Raises:
        RecipeError: with ``file:line`` or the override that caused it.
    """
    tree = read_tree(find_recipe(path))
    apply_overrides(tree, overrides)
    return _recipe(tree)


def _recipe(tree: Tree) -> Recipe:
    return from_tree(Recipe, tree)


def from_tree(kind: type[T], tree: Tree) -> T:
    """A frozen dataclass of sections from a tree, as strict as a recipe.

    Raises:
        RecipeError: with the place in the file, for an unknown or missing key or a value of another type.
    """
    made: T = _section(kind, tree.value, (), tree)
    return made


def find_recipe(path: str) -> Path:
    """The file that ``path`` names.

    Raises:
        RecipeError: there is none; the message has the closest name there is.
    """
    candidates = [Path(path), Path(f"{path}.yaml")]
    if Path(path).name == path:
        candidates += [folder / f"{path}{suffix}" for folder in RECIPE_FOLDERS for suffix in ("", ".yaml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = {file.stem: file for folder in RECIPE_FOLDERS for file in sorted(folder.glob("*.yaml"))}
    close = difflib.get_close_matches(Path(path).stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
    raise RecipeError(f"no recipe {path!r}: neither a file nor a name in ./recipes; {hint}")


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> None:
    """Put ``section.key=value`` texts over a tree, in order.

    Raises:
        RecipeError: an override has no ``=`` or no key, or its value is not YAML.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise RecipeError(f"--set {override}: write it as section.key=value, for example optim.lr=2e-5")
        place = f"--set {override}"
        value, _ = parse_yaml(text, place, lines=False)
        if path[:2] == ("model", "config_overrides") and len(path) > 2:
            path = (*path[:2], ".".join(path[2:]))
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        marks = {path[:length]: place for length in range(1, len(path) + 1)}
        _mark_all(value, path, place, marks)
        kept = {mark: tree.marks[mark] for mark in marks if len(mark) < len(path) and mark in tree.marks}
        tree.merge(Tree(value=nested, origin=place, marks={**marks, **kept}))


def _mark_all(value: Any, path: KeyPath, place: str, marks: dict[KeyPath, str]) -> None:
    marks[path] = place
    if isinstance(value, dict):
        for key, inner in value.items():
            _mark_all(inner, (*path, key), place, marks)


def recipe_from_dict(data: Mapping[str, Any], source: str = "recipe.json", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of plain JSON data, as ``recipe_to_dict`` makes it; as strict as a file.

    Raises:
        RecipeError: starts with ``source``.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{source}: a recipe is a mapping of sections (model, data, optim, train, ...)")
    tree = Tree(value=copy.deepcopy(dict(data)), origin=source)
    apply_overrides(tree, overrides)
    return _recipe(tree)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data with every key, defaults included: JSON and YAML can hold it, ``recipe_from_dict`` reads it."""
    return {field.name: to_plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings and tuples as lists, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return value


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return write_yaml(recipe_to_dict(recipe))


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _section(kind: Any, value: Any, path: KeyPath, tree: Tree) -> Any:
    dotted = ".".join(path)
    if not isinstance(value, Mapping):
        raise RecipeError(f"{tree.where(path)}: {dotted!r} must be a mapping of keys, got {_describe(value)}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            unknown = ".".join((*path, str(key)))
            raise RecipeError(
                f"{tree.where((*path, str(key)))}: unknown key {unknown!r}{did_you_mean(str(key), fields)}"
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(repr(".".join((*path, name))) for name in missing)
        raise RecipeError(f"{tree.where(path)}: missing key{'s' if len(missing) > 1 else ''} {names}")
    return kind(**{key: _value(hints[key], value[key], (*path, key), tree) for key in value})


def _value(kind: Any, value: Any, path: KeyPath, tree: Tree) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, path, tree)
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else _value(inner, value, path, tree)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            choices = ", ".join(args)
            hint = difflib.get_close_matches(str(value), args, n=1)
            mend = f"; did you mean {hint[0]!r}?" if hint else ""
            raise _wrong(path, f"one of {choices}", value, tree, mend)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(path, "a list", value, tree, f"; write [{value}]" if isinstance(value, str | int) else "")
        return tuple(_value(args[0], item, (*path, str(index)), tree) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, "a mapping", value, tree)
        if args[1] is Any:
            return dict(value)
        return {key: _value(args[1], inner, (*path, key), tree) for key, inner in value.items()}
    return _scalar(kind, value, path, tree)


def _scalar(kind: type, value: Any, path: KeyPath, tree: Tree) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        quotes = "; put quotes round it" if kind is str and isinstance(value, int | float | bool) else ""
        if kind in (int, float) and isinstance(value, str) and _is_number(value):
            quotes = "; remove the quotes"
        raise _wrong(path, _KINDS[kind], value, tree, quotes)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, "a finite number", value, tree)
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wrong(path: KeyPath, wanted: str, value: Any, tree: Tree, mend: str = "") -> RecipeError:
    return RecipeError(f"{tree.where(path)}: {'.'.join(path)!r} must be {wanted}, got {_describe(value)}{mend}")


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the text {value!r}" if isinstance(value, str) else f"the number {value!r}"
