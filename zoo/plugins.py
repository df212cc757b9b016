"""Finds plugins, loads each in isolation, and builds the registry from what they name."""

from __future__ import annotations

import contextlib
import importlib
import inspect
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
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from zoo import hooks
from zoo.errors import InputError, ZooError
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import BUILT_IN, KINDS, Component, ModelEntry, Origin, Registry, describe

if TYPE_CHECKING:
    from importlib.metadata import Distribution

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
        off = frozenset(plugin_name(name) for name in disabled)
        if none:
            return cls(frozenset(), off, "--no-plugins")
        allowed = os.environ.get("ZOO_PLUGINS")
        if allowed is None:
            return cls(None, off)
        return cls(frozenset(plugin_name(name) for name in allowed.split(",") if name.strip()), off)

    def why_not(self, name: str) -> str | None:
        """Who switched the plugin off, or ``None``. The name of a distribution stands for all plugins in it."""
        names = {name, name.partition(":")[0]}
        if off := sorted(names & self.disabled):
            return f"-p no:{off[0]}"
        if self.only is not None and not names & self.only:
            return self.only_by
        return None

    def unknown(self, installed: Iterable[str]) -> list[str]:
        """One line for each name that is no installed plugin's: a typo would go unnoticed."""
        known = {part for name in installed for part in (name, name.partition(":")[0])}
        named = [(f"-p no:{name}", name) for name in sorted(self.disabled)]
        named += [(self.only_by, name) for name in sorted(self.only or ())]
        lines = []
        for where, name in named:
            if name not in known:
                near = get_close_matches(name, sorted(known), n=1)
                lines.append(
                    f"{where}: no plugin {name!r} is installed." + (f" Did you mean {near[0]!r}?" if near else "")
                )
        return lines


@dataclass
class Plugin:
    """One distribution's plugin and what became of it."""

    name: str
    version: str
    entry_point: str
    state: Literal["ok", "broken", "disabled"] = "ok"
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Why models that it registers can not be used, one line each."""
    traceback: str = ""
    seconds: float = 0.0
    items: list[Item] = field(default_factory=list)

    @property
    def distribution(self) -> str:
        """The distribution that it came with."""
        return self.name.partition(":")[0]

    @property
    def counts(self) -> dict[str, int]:
        """How many items it registered, by kind."""
        return dict(Counter(item.kind for item in self.items))

    def fail(self, error: BaseException) -> None:
        """Record why nothing of it is registered."""
        self.state, self.reason, self.items = "broken", _reason(error), []
        self.traceback = "".join(traceback.format_exception(error)).rstrip()

    def problems(self) -> list[str]:
        """One line each for what a user should know."""
        told = [f"is broken and was skipped: {self.reason}"] if self.state == "broken" else list(self.warnings)
        if self.faults:
            told.append(_summary(self.faults))
        see = f"See: python -m zoo plugins show {self.name}."
        whose = f"plugin {self.name} {self.version}".strip()
        return [f"{whose} {_sentence(line)} {see}" for line in told]


@dataclass
class Zoo:
    """The registry and the plugins it was built from."""

    registry: Registry
    plugins: list[Plugin]
    warnings: list[str] = field(default_factory=list)
    """What is wrong with the user's own registry files and choice of plugins, one line each."""

    def problems(self) -> list[str]:
        """One line for each thing that is wrong with a plugin, a registry file or the choice of plugins."""
        return [*(line for plugin in self.plugins for line in plugin.problems()), *self.warnings]


def load_zoo(selection: PluginSelection | None = None, *, registry_files: Iterable[Path] = ()) -> Zoo:
    """Build the registry from the built-ins, the installed plugins and the user's own registry files.

    The result depends on what is installed and on the arguments alone, so any process can build the same one.
    ``ZOO_REGISTRY`` may hold further files, separated as in ``PATH``.

    Raises:
        InputError: a registry file is missing or malformed. A plugin's fault never raises: see `Plugin.state`.
    """
    selection = selection if selection is not None else PluginSelection.from_environment()
    registry = Registry()
    registry.add(*_collect(importlib.import_module("zoo.builtin"), Origin(distribution=BUILT_IN)))
    plugins = sorted(_discover(), key=lambda plugin: plugin.name)
    for plugin in plugins:
        _load(plugin, selection, registry)
    registry.broken_plugins = [plugin.name for plugin in plugins if plugin.state == "broken"]
    from_environment = [Path(p) for p in os.environ.get("ZOO_REGISTRY", "").split(os.pathsep) if p]
    files = {path.resolve(): path for path in (*registry_files, *from_environment)}
    own = {path: _add_file(path, registry) for path in files.values()}
    # Only now is everything there that a model may build upon.
    for plugin in plugins:
        plugin.faults = _faults(plugin.items, registry)
    faults = {path: _faults(items, registry) for path, items in own.items()}
    warnings = [_sentence(f"{path} {_summary(lines)}") for path, lines in faults.items() if lines]
    return Zoo(registry, plugins, [*warnings, *selection.unknown(plugin.name for plugin in plugins)])


def plugin_name(name: str) -> str:
    """The name as distributions are compared: ``Acme_Flash`` is ``acme-flash``."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _discover() -> Iterator[Plugin]:
    """Every installed plugin, by its distribution's name, or ``distribution:entry`` where it has several.

    A distribution whose metadata is damaged is a broken plugin, if it is one of ours at all.
    """
    from importlib.metadata import distributions

    seen = set()
    for distribution in distributions():
        text = _entry_points_text(distribution)
        if hooks.ENTRY_POINT_GROUP not in text:
            continue
        name, version = _identity(distribution)
        if not name or (name not in seen and not _is_hidden(name, text)):
            seen.add(name)
            yield from _plugins_of(distribution, name, version)


def _plugins_of(distribution: Distribution, name: str, version: str) -> Iterator[Plugin]:
    try:
        points = {point.name: point.value for point in distribution.entry_points.select(group=hooks.ENTRY_POINT_GROUP)}
    except Exception as error:  # noqa: BLE001 - whatever the metadata's parser raises
        plugin = Plugin(name, version, "")
        plugin.fail(InputError(f"its entry_points.txt can not be read: {describe(error)}"))
        yield plugin
        return
    for entry_name, value in sorted(points.items()):
        plugin = Plugin(name if len(points) == 1 else f"{name}:{entry_name}", version, value)
        if not name:
            plugin.name = entry_name
            plugin.fail(InputError("the METADATA of its distribution is missing or damaged; install it again"))
        yield plugin


def _entry_points_text(distribution: Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except (OSError, UnicodeDecodeError):
        return ""


def _identity(distribution: Distribution) -> tuple[str, str]:
    """Name and version; empty where the metadata is missing."""
    try:
        metadata = distribution.metadata
        return plugin_name(metadata["Name"] or ""), metadata["Version"] or ""
    except Exception:  # noqa: BLE001 - Python versions differ in what they raise
        return "", ""


def _is_hidden(name: str, entry_points_text: str) -> bool:
    """Whether a distribution of the same name comes earlier on the path: that one is imported, so that one counts."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return _entry_points_text(distribution(name)) != entry_points_text
    except (PackageNotFoundError, ValueError):
        return False


def _load(plugin: Plugin, selection: PluginSelection, registry: Registry) -> None:
    """Load one plugin, all or nothing. Whatever it does wrong ends up in the record, not in the caller."""
    if off := selection.why_not(plugin.name):
        plugin.state, plugin.reason, plugin.traceback = "disabled", f"by {off}", ""
    if plugin.state != "ok":
        return
    had_torch, started, printed = "torch" in sys.modules, time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            plugin.items = _import_and_collect(plugin)
        registry.add(*plugin.items)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may even call sys.exit()
        plugin.fail(error)
    plugin.seconds = time.perf_counter() - started
    if not had_torch and "torch" in sys.modules:
        plugin.warnings.append("imports torch when it registers, which slows every command")
    if printed.getvalue().strip():
        plugin.warnings.append(f"prints when it registers: {printed.getvalue().strip().splitlines()[0][:80]!r}")


def _import_and_collect(plugin: Plugin) -> list[Item]:
    if plugin.distribution == BUILT_IN:
        raise InputError(f"its distribution is named {BUILT_IN!r}, which means the built-ins")
    if not re.fullmatch(r"\w+(\.\w+)*", plugin.entry_point):
        raise InputError(f"its entry point must name a module, 'package.module', not {plugin.entry_point!r}")
    module = importlib.import_module(plugin.entry_point)
    version = getattr(module, "ZOO_API", hooks.API_VERSION)
    if version != hooks.API_VERSION:
        raise InputError(f"built for zoo API {version}; this zoo speaks {hooks.API_VERSION}")
    if not any(hasattr(value, "zoo_impl") for value in vars(module).values()):
        plugin.warnings.append(f"has no hook in {plugin.entry_point}")
    return _collect(module, Origin(distribution=plugin.distribution, version=plugin.version))


def _add_file(path: Path, registry: Registry) -> list[Item]:
    """Register the models of a user's own registry file; its stem stands where plugins have their distribution."""
    if path.stem == BUILT_IN:
        raise InputError(f"a registry file can not be called {path.name}: '{BUILT_IN}/' means the built-ins.")
    staged: list[Item] = []
    ModelRegistrar(Origin(distribution=path.stem), staged).path(path)
    try:
        registry.add(*staged)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", fix="Rename the file or the model.") from None
    return staged


def _faults(items: Iterable[Item], registry: Registry) -> list[str]:
    return [fault for fault in map(registry.fault, items) if fault]


def _summary(faults: list[str]) -> str:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"registers a model that can not be used: {faults[0]}{more}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!", ")")) else f"{text}."


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
            returned = implementation.function(*([registrar] * len(implementation.argnames)))
            if returned is not None:  # a wrapper or a coroutine would have registered nothing
                raise InputError(f"{hook_name} returns a {type(returned).__name__}; a register hook returns nothing")
    repeated = [key for key, n in Counter((item.kind, item.name) for item in staged).items() if n > 1]
    if repeated:
        raise InputError(f"registers {' and '.join(f'{kind} {name!r}' for kind, name in repeated)} twice")
    return staged


def _check_unmarked(module: ModuleType) -> None:
    """A hook without its marker would be ignored in silence."""
    for name, value in vars(module).items():
        is_hook = name.startswith("zoo_register_") or hasattr(getattr(hooks, name, None), "zoo_spec")
        if is_hook and callable(value) and not hasattr(value, "zoo_impl"):
            raise InputError(f"{name} lacks the @hookimpl marker")


def _hook_error(error: pluggy.PluginValidationError) -> str:
    text = " ".join(str(error).split())
    if unknown := re.search(r"unknown hook '(\w+)'", text):
        near = get_close_matches(unknown[1], [name for name in dir(hooks) if name.startswith("zoo_")], n=1)
        return f"there is no hook {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
    if extra := re.search(r"hook '(\w+)'.*Argument\(s\) \{(.+?)\}", text):
        known: Any = inspect.signature(getattr(hooks, extra[1])).parameters
        given = ", ".join(sorted(extra[2].split(", ")))
        return f"{extra[1]} takes {given}, which the hook does not have; it has {', '.join(map(repr, known))}"
    return text


def _reason(error: BaseException) -> str:
    if isinstance(error, ZooError):
        return " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"calls sys.exit({error.code!r}) when it is imported"
    return describe(error)
