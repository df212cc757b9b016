"""How a mutant is put before its contract, and the table of what caught which."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from zoo.plugins import PluginSelection, load_zoo
from zoo.registry import KINDS, Component, Origin, Registry
from zoo.testing.contract import Contract

TABLE: list[tuple[str, str, str, str]] = []
"""Kind, mutant, the check that caught it, and what that said: printed at the end of the tests."""


@dataclass(frozen=True)
class Mutant:
    """A component with something wrong, and the checks that must fail for it.

    Attributes:
        target: its name in the module of its kind; by default in capitals or as a class, whichever is there.
        settings: attributes and methods of the contract that it is put before.
    """

    name: str
    target: str
    caught_by: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    contract: type[Contract] | None = None


@cache
def _built_in() -> Registry:
    return load_zoo(PluginSelection(only=frozenset())).registry


def registry_with(*components: Component) -> Registry:
    """The built-ins, and others."""
    registry = Registry()
    registry.add(*(item for kind in KINDS for _, item in _built_in().items(kind)), *components)
    return registry


def before(contract: type[Contract], module: str, mutant: Mutant) -> Contract:
    """The contract that a mutant has to be caught by."""
    component = Component(
        kind=contract.kind,
        name="mutant",
        target=f"tests.contract.mutants.{module}:{mutant.target}",
        help="a mutant",
        matches=("mutant",),
        origin=Origin(distribution="mutants", version="1"),
    )
    registry = registry_with(component)
    attributes = {"component": "mutant", "registry": lambda self: registry, **mutant.settings}
    made: Contract = type("Mutated", (mutant.contract or contract,), attributes)()
    return made


def failure_of(contract: Contract, check: str, directory: Path) -> str | None:
    """What a check says of a mutant; ``None`` if it passes."""
    method = getattr(contract, check)
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [directory] if "tmp_path" in inspect.signature(method).parameters else []
    try:
        method(*arguments)
    except pytest.skip.Exception as skipped:
        return pytest.fail(f"{check} is {skipped}")
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - whatever a mutant makes of it
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def assert_caught(contract: type[Contract], module: str, mutant: Mutant, directory: Path) -> None:
    """Every check that is meant for the mutant fails, and the table has what it said."""
    made = before(contract, module, mutant)
    for number, check in enumerate(mutant.caught_by):
        said = failure_of(made, check, directory / str(number))
        assert said is not None, f"{check} does not catch the mutant {mutant.name!r}"
        TABLE.append((contract.kind, mutant.name, check, said))
