"""Recipes as YAML 1.2 files: read with ``extends``, overridden by flags and ``--set``, checked as a whole."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from zoo.errors import InputError, UnknownNameError
from zoo.train.recipe import Recipe, Use

Key = tuple[str, ...]


@dataclass
class Draft:
    """Values for a recipe, and who gave each: ``recipe.yaml:7``, ``--lr``, ``--set adapter.r=16``."""

    values: dict[str, Any] = field(default_factory=dict)
    givers: dict[Key, str] = field(default_factory=dict)

    def put(self, key: Key, value: Any, giver: str) -> None:
        """Set a value; mappings on the way are made, and a component's short form, or default, is written out."""
        into = self.values
        for name in key[:-1]:
            inner = into.get(name, _default_component(name) if into is self.values else None)
            into[name] = {"use": inner} if isinstance(inner, str) else dict(inner or {})
            into = into[name]
        into[key[-1]] = value
        self.givers[key] = giver

    def finish(self) -> Recipe:
        """Check everything.

        Raises:
            InputError: it says all that is wrong, a line for each fault.
        """
        try:
            return Recipe.model_validate(self.values)
        except ValidationError as error:
            problems = [self._problem(detail) for detail in error.errors(include_url=False)]
            raise InputError("\n  ".join(["the recipe is not right:", *problems])) from None

    def _problem(self, detail: ErrorDetails) -> str:
        key = tuple(str(part) for part in detail["loc"])
        giver = next((self.givers[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.givers), None)
        where = f"{giver}: " if giver else ""
        name = ".".join(key)
        if detail["type"] == "extra_forbidden":
            return where + str(UnknownNameError("key of a recipe", name, Recipe.model_fields))
        if detail["type"] == "missing" and len(key) > 1:
            beside = next((giver for given, giver in self.givers.items() if given[: len(key) - 1] == key[:-1]), name)
            return f"{beside}: {name} is missing: it names the component whose options these are."
        if detail["type"] == "missing":
            return f"{name} is missing: give --{name.replace('_', '-')}."
        said = detail["msg"].removeprefix("Value error, ")
        given = f", not {detail['input']!r}" if key and not isinstance(detail["input"], Mapping) else ""
        return f"{where}{name + ': ' if name else ''}{said[:1].lower()}{said[1:]}{given}."


def _default_component(key: str) -> str | None:
    default = Recipe.model_fields[key].default if key in Recipe.model_fields else None
    return default.use if isinstance(default, Use) else None


def read_recipe(path: Path, _inside: tuple[Path, ...] = ()) -> Draft:
    """The values of a file, on top of those of the file that its ``extends`` names.

    Raises:
        InputError: a file is not there, is no YAML mapping, or extends itself.
    """
    if path.resolve() in _inside:
        raise InputError(f"{path} extends itself.")
    mapping = _read_mapping(path)
    base = mapping.pop("extends", None)
    draft = read_recipe(path.parent / str(base), (*_inside, path.resolve())) if base is not None else Draft()
    for key, value, line in _leaves(mapping):
        draft.put(key, value, f"{path}:{line}")
    return draft


def _read_mapping(path: Path) -> CommentedMap:
    try:
        data = YAML().load(path)
    except OSError as error:
        raise InputError(f"can not read the recipe {path}: {error.strerror}.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {error}") from None
    if not isinstance(data, CommentedMap):
        raise InputError(f"{path} is no recipe: it should hold keys and values, such as 'model: gpt2'.")
    return data


def _leaves(mapping: CommentedMap, prefix: Key = ()) -> Iterable[tuple[Key, Any, int]]:
    """Keys, values and line numbers, from 1. A mapping that names its component replaces what was there before."""
    for name, value in mapping.items():
        key, line = (*prefix, str(name)), mapping.lc.key(name)[0] + 1
        if isinstance(value, CommentedMap) and "use" not in value and value:
            yield from _leaves(value, key)
        else:
            yield key, _plain(value), line


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    for kind in (bool, int, float, str):  # ruamel's own numbers and strings remember how they were written
        if isinstance(value, kind):
            return kind(value)
    return value


def parse_setting(text: str) -> tuple[Key, Any]:
    """``adapter.r=16`` as a key and a value, which is read as YAML.

    Raises:
        InputError: there is no ``=``, or the value is no YAML.
    """
    name, separator, value = text.partition("=")
    if not separator or not all(name.split(".")):
        raise InputError(f"--set {text} is no setting.", fix="Write --set KEY=VALUE, such as --set adapter.r=16.")
    try:
        return tuple(name.strip().split(".")), _plain(YAML(typ="safe", pure=True).load(value))
    except YAMLError:
        raise InputError(f"--set {text}: {value!r} is no YAML value.") from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write every key, defaults included, so that a later version with other defaults does the same."""
    yaml = YAML()
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(recipe_values(recipe), text)
    path.write_text(text.getvalue(), encoding="utf-8")


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, components without options by their names alone."""
    return {name: _shortest(getattr(recipe, name)) for name in Recipe.model_fields}


def _shortest(value: Any) -> Any:
    if isinstance(value, Use):
        return {"use": value.use, **value.options} if value.options else value.use
    if isinstance(value, tuple):
        return [_shortest(inner) for inner in value]
    return value
