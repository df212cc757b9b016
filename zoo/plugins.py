"""Finds plugins, loads each in isolation, and builds the registry from what they name."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import pluggy

from zoo import hooks
from zoo.errors import InputError, ZooError
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import BUILT_IN, KINDS, Component, ModelEntry, Origin, Registry

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Item = Component | ModelEntry
_REGISTER_HOOKS = {f"zoo_register_{plural}": kind for kind, plural in KINDS.items()}


@dataclass(frozen=True)
class PluginSelection:
    """Which installed plugins may load: all, those of ``only``, and never those of ``disabled``."""

    only: frozenset[str] | None = None
    disabled: frozenset[str] = frozenset()
    only_by: str = "ZOO_PLUGINS"

    @classmethod
    def from_environment(cls, disabled: Iterable[str] = (), *, none: bool = False) -> PluginSelection:
        """The selection that ``-p no:NAME``, ``--no-plugins`` and ``ZOO_PLUGINS=a,b`` (empty: none) make together."""
        off = frozenset(_normalized(name) for name in disabled)
        if none:
            return cls(frozenset(), off, "--no-plugins")
        allowed = os.environ.get("ZOO_PLUGINS")
        if allowed is None:
            return cls(None, off)
        return cls(frozenset(_normalized(name) for name in allowed.split(",") if name.strip()), off)

    def why_not(self, name: str) -> str | None:
        """Who switched the plugin off, or ``None``."""
        if name in self.disabled:
            return f"-p no:{name}"
        if self.only is not None and name not in self.only:
            return self.only_by
        return None


@dataclass
class Plugin:
    """One distribution's plugin and what became of it."""

    name: str
    version: str
    entry_point: str
    state: Literal["ok", "broken", "disabled"] = "ok"
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    traceback: str = ""
    seconds: float = 0.0
    items: list[Item] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many items it registered, by kind."""
        return dict(Counter(item.kind for item in self.items))

    def problems(self) -> list[str]:
        """One line each for what a user should know."""
        if self.state == "broken":
            return [f"plugin {self.name} {self.version} is broken and was skipped: {self.reason}"]
        return [f"plugin {self.name} {self.version} {warning}" for warning in self.warnings]


@dataclass
class Zoo:
    """The registry and the plugins it was built from."""

    registry: Registry
    plugins: list[Plugin]

    def problems(self) -> list[str]:
        """One line for each thing that is wrong with a plugin."""
        return [line for plugin in self.plugins for line in plugin.problems()]


def load_zoo(selection: PluginSelection | None = None, *, registry_files: Iterable[Path] = ()) -> Zoo:
    """Build the registry from the built-ins, the installed plugins and the user's own registry files.

    The result depends on what is installed and on the arguments alone, so any process can build the same one.
    ``ZOO_REGISTRY`` may hold further files, separated as in ``PATH``.

    Raises:
        InputError: a registry file is missing or malformed. A plugin's fault never raises: see `Plugin.state`.
    """
    selection = selection if selection is not None else PluginSelection.from_environment()
    registry = Registry()
    for item in _collect(importlib.import_module("zoo.builtin"), Origin(distribution=BUILT_IN)):
        registry.add(item)
    plugins = [_load(name, entry_point, selection) for name, entry_point in _discover()]
    for plugin in plugins:
        for item in plugin.items:
            registry.add(item)
    registry.broken_plugins = [plugin.name for plugin in plugins if plugin.state == "broken"]
    from_environment = [Path(p) for p in os.environ.get("ZOO_REGISTRY", "").split(os.pathsep) if p]
    for path in (*registry_files, *from_environment):
        staged: list[Item] = []
        ModelRegistrar(Origin(distribution=path.stem), staged).path(path)
        for item in staged:
            registry.add(item)
    return Zoo(registry, plugins)


def _discover() -> Iterator[tuple[str, EntryPoint]]:
    """Every entry point of the group with its plugin's name: the distribution, or ``distribution:entry``."""
    from importlib.metadata import entry_points

    found: dict[str, dict[str, EntryPoint]] = {}
    for entry_point in entry_points(group=hooks.ENTRY_POINT_GROUP):
        distribution = _normalized(entry_point.dist.name) if entry_point.dist else entry_point.name
        found.setdefault(distribution, {}).setdefault(entry_point.name, entry_point)
    for distribution, points in sorted(found.items()):
        for entry_name, entry_point in sorted(points.items()):
            yield (distribution if len(points) == 1 else f"{distribution}:{entry_name}"), entry_point


def _load(name: str, entry_point: EntryPoint, selection: PluginSelection) -> Plugin:
    """Load one plugin, all or nothing. Whatever it does wrong ends up in the record, not in the caller."""
    plugin = Plugin(name, entry_point.dist.version if entry_point.dist else "", entry_point.value)
    if off := selection.why_not(name):
        plugin.state, plugin.reason = "disabled", f"by {off}"
        return plugin
    had_torch, started, printed = "torch" in sys.modules, time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module = importlib.import_module(entry_point.module)
            _check_api(module)
            plugin.items = _collect(module, Origin(distribution=name.partition(":")[0], version=plugin.version))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may even call sys.exit()
        plugin.state, plugin.reason, plugin.items = "broken", _reason(error), []
        plugin.traceback = traceback.format_exc()
    plugin.seconds = time.perf_counter() - started
    if not had_torch and "torch" in sys.modules:
        plugin.warnings.append("imports torch when it registers, which slows every command")
    if printed.getvalue().strip():
        plugin.warnings.append(f"prints when it registers: {printed.getvalue().strip().splitlines()[0][:80]!r}")
    return plugin


def _check_api(module: ModuleType) -> None:
    version = getattr(module, "ZOO_API", hooks.API_VERSION)
    if version != hooks.API_VERSION:
        raise InputError(f"built for zoo API {version}; this zoo speaks {hooks.API_VERSION}")


def _collect(module: ModuleType, origin: Origin) -> list[Item]:
    """Everything that a plugin module's register hooks name.

    Raises:
        ZooError: a hook is misspelt, takes an argument that no hook has, or names one thing twice.
    """
    manager = pluggy.PluginManager("zoo")
    manager.add_hookspecs(hooks)
    try:
        manager.register(module, name=origin.distribution)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise InputError(_hook_error(error)) from error
    _check_unmarked(module)
    staged: list[Item] = []
    for hook_name, kind in _REGISTER_HOOKS.items():
        caller = getattr(manager.hook, hook_name)
        for implementation in caller.get_hookimpls():
            registrar = ModelRegistrar(origin, staged) if kind == "model" else Registrar(kind, origin, staged)
            arguments = {"register": registrar}
            implementation.function(*(arguments[name] for name in implementation.argnames))
    repeated = [key for key, n in Counter((item.kind, item.name) for item in staged).items() if n > 1]
    if repeated:
        raise InputError(f"registers {' and '.join(f'{kind} {name!r}' for kind, name in repeated)} twice")
    return staged


def _check_unmarked(module: ModuleType) -> None:
    """A register hook without its marker would be ignored in silence."""
    for name, value in vars(module).items():
        if name.startswith("zoo_register_") and callable(value) and not hasattr(value, "zoo_impl"):
            raise InputError(f"{name} lacks the @hookimpl marker")


def _hook_error(error: pluggy.PluginValidationError) -> str:
    text = " ".join(str(error).split())
    if unknown := re.search(r"unknown hook '(\w+)'", text):
        near = get_close_matches(unknown[1], [name for name in dir(hooks) if name.startswith("zoo_")], n=1)
        return f"there is no hook {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
    if extra := re.search(r"hook '(\w+)'.*Argument\(s\) \{(.+?)\}", text):
        return f"{extra[1]} takes {extra[2]}, which the hook does not have; its argument is 'register'"
    return text


def _reason(error: BaseException) -> str:
    if isinstance(error, ZooError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"calls sys.exit({error.code!r}) when it is imported"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
