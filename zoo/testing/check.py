"""Runs the contracts of all that a distribution registers: what ``zoo plugins check`` does.

A component is checked by the contract of its kind. A plugin that has to say more, options or an expected failure, names
a module with contracts of its own: ``ZOO_CONTRACTS = "package.contracts"``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest

from zoo.errors import InputError, UnknownNameError, ZooError
from zoo.plugins import Zoo, load_zoo, plugin_name
from zoo.registry import BUILT_IN, Component
from zoo.testing import CONTRACTS, PluginContract
from zoo.testing.contract import Contract

Outcome = Literal["passed", "failed", "expected", "not run"]
_REPORT = "ZOO_CHECK_REPORT"
"""Environment variable of the process that runs the checks: where it writes what came of them."""


@dataclass(frozen=True)
class Result:
    """What came of one check."""

    kind: str
    component: str
    check: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0


def contracts_of(distribution: str, kinds: Collection[str] = (), *, built: Zoo | None = None) -> dict[str, Any]:
    """A test class for each contract that a distribution's plugin has to meet, by its name.

    Args:
        kinds: of components; by default all, and the plugin itself.

    Raises:
        UnknownNameError: no plugin of that name is installed, or there is no such kind.
        InputError: the plugin is broken or switched off.
    """
    built = built or load_zoo()
    for kind in kinds:
        if kind not in CONTRACTS:
            raise UnknownNameError("kind", kind, CONTRACTS)
    name, modules = _plugin_modules(distribution, built)
    own = _declared(modules)
    classes: list[type[Contract]] = []
    if name != BUILT_IN and not kinds:
        classes += [_named(PluginContract, name)]
    for kind, contract in CONTRACTS.items():
        for ref, component in built.registry.components(kind) if not kinds or kind in kinds else ():
            if component.origin.distribution == name:
                classes += _of_component(ref, component, contract, own)
    return {f"Test{number}{_identifier(c)}": c for number, c in enumerate(classes)}


def check(distribution: str, kinds: Collection[str] = ()) -> list[Result]:
    """Run the contracts of a distribution in a process of their own, with no other plugin there.

    Raises:
        UnknownNameError, InputError: as `contracts_of`.
        ZooError: the process ended before the checks did.
    """
    name = distribution if distribution == BUILT_IN else plugin_name(distribution)
    contracts_of(name, kinds)  # so that its errors are told here
    with TemporaryDirectory() as directory:
        path, report = Path(directory) / "test_contracts.py", Path(directory) / "report.json"
        path.write_text(
            f"from zoo.testing.check import contracts_of\nglobals().update(contracts_of({name!r}, {tuple(kinds)!r}))\n",
            encoding="utf-8",
        )
        options = ["-q", "-p", "no:cacheprovider", "-p", "zoo.testing.check", "-c", os.devnull, "--rootdir", directory]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {_REPORT: str(report), "ZOO_PLUGINS": "" if name == BUILT_IN else name}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(path)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1) or not report.is_file():
            raise ZooError(f"the checks of {name} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        return [Result(**values) for values in json.loads(report.read_text(encoding="utf-8"))]


def _plugin_modules(distribution: str, built: Zoo) -> tuple[str, list[str]]:
    """The name of a distribution, and the modules of its plugins."""
    if distribution == BUILT_IN:
        return BUILT_IN, ["zoo.builtin"]
    name = plugin_name(distribution)
    plugins = [plugin for plugin in built.plugins if plugin.distribution == name]
    if not plugins:
        known = [BUILT_IN, *(plugin.distribution for plugin in built.plugins)]
        raise UnknownNameError("plugin", distribution, known, fix="See: python -m zoo plugins list.")
    for plugin in plugins:
        if plugin.state != "ok":
            raise InputError(f"plugin {plugin.name} is {plugin.state}: {plugin.reason}.")
    return name, [plugin.entry_point for plugin in plugins]


def _declared(modules: list[str]) -> list[type[Contract]]:
    """Contracts that the plugin's own module of contracts has, in order."""
    found: list[type[Contract]] = []
    for module in modules:
        where = getattr(import_module(module), "ZOO_CONTRACTS", None)
        for value in vars(import_module(where)).values() if where else ():
            if isinstance(value, type) and issubclass(value, Contract) and "component" in vars(value):
                found.append(value)
    return found


def _of_component(
    ref: str, component: Component, contract: type[Contract], own: list[type[Contract]]
) -> Iterator[type[Contract]]:
    declared = [c for c in own if c.kind == component.kind and c.component in (ref, component.name)]
    yield from declared or [_named(contract, ref)]


def _named(contract: type[Contract], component: str) -> type[Contract]:
    return type(contract.__name__, (contract,), {"component": component, "__module__": __name__})


def _identifier(contract: type[Contract]) -> str:
    return re.sub(r"\W", "_", f"_{contract.kind}_{contract.component}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """As a plugin of the process that runs the checks: note what came of each."""
    report: pytest.TestReport = yield
    contract: Any = getattr(item, "cls", None)
    if contract is not None and (report.when == "call" or not report.passed):
        results = item.session.stash.setdefault(_RESULTS, [])
        results.append(
            Result(
                contract.kind,
                contract.component,
                item.name,
                _outcome(report),
                _reason(report, call),
                round(report.duration, 3),
            )
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report."""
    if where := os.environ.get(_REPORT):
        results = session.stash.get(_RESULTS, [])
        Path(where).write_text(json.dumps([asdict(result) for result in results]), encoding="utf-8")


_RESULTS = pytest.StashKey[list[Result]]()


def _outcome(report: pytest.TestReport) -> Outcome:
    if report.skipped:
        return "expected" if hasattr(report, "wasxfail") else "not run"
    return "passed" if report.passed else "failed"


def _reason(report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    if report.passed:
        return ""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ")
    if report.skipped:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return text.removeprefix("Skipped: ").removeprefix("not run: ")
    if call.excinfo is None:  # it passed, and was expected to fail
        return str(report.longrepr)
    message = str(call.excinfo.value) or call.excinfo.exconly()
    return message.partition("\nassert ")[0].strip() if message.partition("\nassert ")[0].strip() else message
