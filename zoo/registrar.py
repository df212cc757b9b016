"""What a register hook is handed: callables that turn its arguments into registry items of the calling plugin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import InputError, UnknownNameError
from zoo.registry import Component, DeviceNeeds, ModelEntry, Origin

_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*")
_TARGET = re.compile(r"[\w.]+:\w+")


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
            InputError: the name or the target is malformed.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no valid name: use a-z, 0-9, '.', '_' and '-'.")
        if not _TARGET.fullmatch(target):
            raise InputError(f"{name!r} has the target {target!r}; write 'package.module:Object'.")
        self._staged.append(
            Component(
                kind=self._kind,
                name=name,
                target=target,
                help=help,
                options=options,
                requires=tuple(requires),
                needs=needs,
                fix=fix,
                matches=tuple(matches),
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
        """Name a model. A family or a base (``extends``) must be given; the spec is checked when it is used."""
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no valid model name: use a-z, 0-9, '.', '_' and '-'.")
        if not family and not extends:
            raise InputError(f"model {name!r} names neither a family nor a model that it extends.")
        self._staged.append(
            ModelEntry(
                name=name,
                family=family,
                spec_values=dict(spec or {}),
                sources=tuple(sources),
                license=license,
                help=help,
                extends=extends,
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
                    raise UnknownNameError(f"key of model {name!r} in {path}", key, _ENTRY_KEYS)
            self(name, **entry)


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
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict) or data.get("schema") != 1 or not isinstance(data.get("models"), dict):
        raise InputError(f"{path} is no registry file.", fix="It starts with 'schema: 1' and has a mapping 'models:'.")
    for name, entry in data["models"].items():
        if not isinstance(entry, dict):
            raise InputError(f"model {name!r} in {path} must be a mapping, not {entry!r}.")
    models: dict[str, dict[str, Any]] = data["models"]
    return models
