"""What a register hook is handed: callables that turn its arguments into registry items of the calling plugin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import InputError, UnknownNameError
from zoo.registry import Component, DeviceNeeds, ModelEntry, Origin

_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*")
_TARGET = re.compile(r"\w+(\.\w+)*:\w+")
_RESERVED = ("auto",)


class Registrar:
    """Registers components of one kind for one plugin."""

    def __init__(self, kind: str, origin: Origin, staged: list[Component | ModelEntry]) -> None:
        self._kind, self._origin, self._staged = kind, origin, staged

    def __call__(
        self,
        name: str,
        target: str,
        *,
        help: str,  # noqa: A002 - the word that click and argparse authors expect
        options: str | None = None,
        requires: Iterable[str] = (),
        needs: DeviceNeeds | None = None,
        fix: str | None = None,
        matches: Iterable[str] = (),
    ) -> None:
        """Name a component. See `zoo.registry.Component` for the fields.

        Raises:
            InputError: the name or the target is malformed, or another argument is not what it should be.
        """
        whose = f"{self._kind} {_checked_name(self._kind, name)!r}"
        if needs is not None and not isinstance(needs, DeviceNeeds):
            raise InputError(f"{whose}: needs is a zoo.registry.DeviceNeeds, not {needs!r}.")
        self._staged.append(
            Component(
                kind=self._kind,
                name=name,
                target=_target(whose, "target", target),
                help=_line(whose, "help", help),
                options=None if options is None else _target(whose, "options", options),
                requires=_requirements(whose, requires),
                needs=needs,
                fix=None if fix is None else _line(whose, "fix", fix),
                matches=_strings(whose, "matches", matches),
                origin=self._origin,
            )
        )


class ModelRegistrar:
    """Registers model entries for one plugin."""

    def __init__(self, origin: Origin, staged: list[Component | ModelEntry]) -> None:
        self._origin, self._staged = origin, staged

    def __call__(
        self,
        name: str,
        *,
        family: str = "",
        spec: Mapping[str, Any] | None = None,
        sources: Iterable[str] = (),
        license: str = "",  # noqa: A002 - the field's own name
        help: str = "",  # noqa: A002
        extends: str | None = None,
    ) -> None:
        """Name a model. A family or a base (``extends``) must be given; the spec is checked when it is used.

        Raises:
            InputError: the name is malformed, or another argument is not what it should be.
        """
        whose = f"model {_checked_name('model', name)!r}"
        if not family and not extends:
            raise InputError(f"{whose} names neither a family nor a model that it extends.")
        if spec is not None and not isinstance(spec, Mapping):
            raise InputError(f"{whose}: spec is a mapping, not {spec!r}.")
        self._staged.append(
            ModelEntry(
                name=name,
                family=_line(whose, "family", family),
                spec_values={str(key): value for key, value in (spec or {}).items()},
                sources=_strings(whose, "sources", sources),
                license=_line(whose, "license", license),
                help=_line(whose, "help", help),
                extends=None if extends is None else _line(whose, "extends", extends),
                origin=self._origin,
            )
        )

    def file(self, package: str, name: str = "registry.yaml") -> None:
        """Register every entry of a registry file that lies inside a (top-level) package.

        The package is located, not imported.

        Raises:
            InputError: the file is missing, is no valid YAML, or an entry is malformed.
        """
        from importlib.util import find_spec

        found = find_spec(package)
        folders = list(found.submodule_search_locations or ()) if found else []
        for folder in folders:
            if (path := Path(folder) / name).is_file():
                return self.path(path)
        raise InputError(f"package {package!r} has no file {name!r}.")

    def path(self, path: Path) -> None:
        """Register every entry of the registry file at ``path``. Raises as `file`."""
        for name, entry in read_registry_file(path).items():
            for key in entry:
                if key not in _ENTRY_KEYS:
                    raise UnknownNameError(f"key of model {name!r} in {path}", str(key), _ENTRY_KEYS)
            try:
                self(name, **entry)
            except InputError as error:
                raise InputError(f"{path}: {error.message}", fix=error.fix) from None


_ENTRY_KEYS = ("family", "spec", "sources", "license", "help", "extends")


def read_registry_file(path: Path) -> dict[str, dict[str, Any]]:
    """The ``models`` of a registry file, by name.

    Raises:
        InputError: the file can not be read, or is not ``schema: 1`` with a mapping of ``models``.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise InputError(f"can not read the registry file {path}: {error.strerror}.") from None
    except (YAMLError, ValueError) as error:  # ValueError: a number, date or character that is none
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict) or data.get("schema") != 1 or not isinstance(data.get("models"), dict):
        raise InputError(f"{path} is no registry file.", fix="It starts with 'schema: 1' and has a mapping 'models:'.")
    for name, entry in data["models"].items():
        if not isinstance(entry, dict):
            raise InputError(f"model {name!r} in {path} must be a mapping, not {entry!r}.")
    models: dict[str, dict[str, Any]] = data["models"]
    return models


def _checked_name(kind: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no valid {kind} name: use a-z, 0-9, '.', '_' and '-'.")
    if name in _RESERVED:
        raise InputError(f"{name!r} is no {kind} name: the word is zoo's own.")
    return name


def _target(whose: str, argument: str, value: Any) -> str:
    if not isinstance(value, str) or not _TARGET.fullmatch(value):
        raise InputError(f"{whose} has the {argument} {value!r}; write 'package.module:Object'.")
    return value


def _line(whose: str, argument: str, value: Any) -> str:
    """A string as one line: what is listed must stay one row."""
    if not isinstance(value, str):
        raise InputError(f"{whose}: {argument} is a string, not {value!r}.")
    return " ".join(value.split())


def _strings(whose: str, argument: str, values: Any) -> tuple[str, ...]:
    """A sequence of strings, and not one string, which is a sequence of its letters."""
    items = values if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)
    if not isinstance(items, tuple) or not all(isinstance(item, str) for item in items):
        raise InputError(f"{whose}: {argument} is a list of strings, not {values!r}.")
    return items


def _requirements(whose: str, values: Any) -> tuple[str, ...]:
    requirements = _strings(whose, "requires", values)
    if requirements:
        from packaging.requirements import InvalidRequirement, Requirement

        for text in requirements:
            try:
                Requirement(text)
            except InvalidRequirement:
                raise InputError(f"{whose}: {text!r} is no requirement; write it as for pip: 'name>=1.0'.") from None
    return requirements
