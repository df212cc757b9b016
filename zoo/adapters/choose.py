"""From a registered name and options to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from zoo.adapters.base import Adapter
from zoo.errors import InputError, UnknownNameError
from zoo.registry import Registry


def choose_adapter(name: str, options: Mapping[str, Any], registry: Registry) -> Adapter:
    """The adapter of that name with those options; lists are taken for tuples.

    Raises:
        UnknownNameError: no adapter, or no option of it, has that name.
        UnavailableError: it can not be imported.
    """
    kind: type[Adapter] = registry.load("adapter", name)
    known = [field.name for field in fields(kind.options_type)]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of adapter {name!r}", option, known)
    for option, value in options.items():
        if isinstance(value, str) and option in ("targets", "feedforward", "modules_to_save", "norms"):
            raise InputError(f"{option} is a list of names, not {value!r}.", fix=f"Write {option}=[{value!r}].")
    return kind(kind.options_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}), name)
