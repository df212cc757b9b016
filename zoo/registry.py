"""What zoo knows by name: components (code, imported when used) and model entries (data)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from zoo.errors import InputError, UnavailableError, UnknownNameError
from zoo.spec import ModelSpec

KINDS: dict[str, str] = {
    "model": "models",
    "family": "families",
    "attention": "attention",
    "adapter": "adapters",
    "precision": "precisions",
    "quantizer": "quantizers",
    "converter": "converters",
    "source": "sources",
    "dataset": "datasets",
    "prompt": "prompts",
    "sampler": "samplers",
    "logger": "loggers",
    "command": "commands",
}
"""Every kind and its plural, as the hooks and the command line spell them."""

BUILT_IN = "zoo"
"""Origin of everything that zoo itself registers."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which distribution (or registry file) something came from."""

    distribution: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True, kw_only=True)
class DeviceNeeds:
    """Hardware without which a component can not run."""

    accelerator: Literal["cuda", "mps"]
    min_capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.min_capability is None:
            return self.accelerator
        return f"{self.accelerator} with compute capability {'.'.join(map(str, self.min_capability))} or newer"


@dataclass(frozen=True, kw_only=True)
class Component:
    """One thing that can be chosen by name. ``target`` is imported when the component is used, not before."""

    kind: str
    name: str
    target: str
    """``package.module:Object``."""
    help: str
    options: str | None = None
    """``package.module:Dataclass`` of its options, in a module that imports no torch."""
    requires: tuple[str, ...] = ()
    """PEP 508 requirements beyond what zoo itself depends on."""
    needs: DeviceNeeds | None = None
    fix: str | None = None
    """The command that installs what is missing."""
    matches: tuple[str, ...] = ()
    """Outside names it answers to: ``model_type`` for families, URL scheme for sources, suffix for converters."""
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A named model: which family, which shape, where its weights are."""

    name: str
    family: str = ""
    spec_values: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    """Where the weights can be had, best first: ``hf:org/name``, ``pypi:dist==1.0/member#sha256=...``."""
    license: str = ""
    help: str = ""
    extends: str | None = None
    origin: Origin

    kind = "model"

    @property
    def spec(self) -> ModelSpec:
        """The entry's architecture.

        Raises:
            InputError: the entry's values do not make a valid spec.
        """
        try:
            return ModelSpec.from_dict(self.spec_values)
        except InputError as error:
            raise InputError(f"model {self.name!r} ({self.origin}): {error.message}", fix=error.fix) from None


@dataclass(frozen=True)
class Status:
    """Whether a component can be used here: its state, why not, and the command that fixes it."""

    state: Literal["ok", "unavailable", "unprobed", "broken"]
    reasons: tuple[str, ...] = ()
    fix: str | None = None


class Registry:
    """Components and model entries by kind and name.

    A reference is ``name`` or ``distribution/name``. A built-in's bare name can not be shadowed; a bare name that
    two other distributions share must be written with its distribution.
    """

    def __init__(self) -> None:
        self._items: dict[str, dict[str, list[Component | ModelEntry]]] = {kind: {} for kind in KINDS}
        self.broken_plugins: list[str] = []
        """Names of plugins that failed to load; errors about unknown names mention them."""

    def add(self, item: Component | ModelEntry) -> None:
        """Register one item.

        Raises:
            InputError: the same distribution already registered this name.
        """
        bucket = self._items[item.kind].setdefault(item.name, [])
        if any(other.origin.distribution == item.origin.distribution for other in bucket):
            raise InputError(f"{item.kind} {item.name!r} is registered twice by {item.origin}.")
        bucket.append(item)
        bucket.sort(key=lambda i: (i.origin.distribution != BUILT_IN, i.origin.distribution))

    def items(self, kind: str) -> Iterator[tuple[str, Component | ModelEntry]]:
        """Every item of a kind with the shortest reference that reaches it, sorted by name."""
        for name, bucket in sorted(self._items[kind].items()):
            for item in bucket:
                yield self._shortest_reference(name, item, bucket), item

    def components(self, kind: str) -> Iterator[tuple[str, Component]]:
        """As `items`, for every kind but models."""
        return ((ref, item) for ref, item in self.items(kind) if isinstance(item, Component))

    def models(self) -> Iterator[tuple[str, ModelEntry]]:
        """Every listed model, inheritance resolved; names that begin with ``_`` are bases for others only."""
        for ref, item in self.items("model"):
            if isinstance(item, ModelEntry) and not item.name.startswith("_"):
                yield ref, self._resolve(item)

    def find(self, kind: str, ref: str) -> Component:
        """The component that ``ref`` names.

        Raises:
            UnknownNameError: nothing has this name.
            InputError: several distributions have it and none is named.
        """
        item = self._find(kind, ref)
        assert isinstance(item, Component)
        return item

    def model(self, ref: str) -> ModelEntry:
        """The model entry that ``ref`` names, inheritance resolved. Raises as `find`."""
        item = self._find("model", ref)
        assert isinstance(item, ModelEntry)
        return self._resolve(item)

    def has_model(self, ref: str) -> bool:
        """Whether ``ref`` is the name of a listed model."""
        name = ref.rpartition("/")[2]
        return name in self._items["model"] and any(ref in (r, name) for r, _ in self.items("model"))

    def match(self, kind: str, outside_name: str) -> Component | None:
        """The component that declares ``outside_name`` in its ``matches``; built-ins first."""
        found = [c for _, c in self.components(kind) if outside_name in c.matches]
        own = [c for c in found if c.origin.distribution == BUILT_IN]
        if len(found) > 1 and not own:
            owners = " and ".join(f"{c.name!r} of {c.origin}" for c in found)
            raise InputError(
                f"{outside_name!r} is claimed by the {KINDS[kind]} {owners}.", fix="Switch one off: -p no:NAME."
            )
        return next(iter(own or found), None)

    def load(self, kind: str, ref: str) -> Any:
        """Import and return what the component points to.

        Raises:
            UnknownNameError: nothing has this name.
            UnavailableError: it can not be used here; the message has the reasons and the remedy.
        """
        component = self.find(kind, ref)
        status = component_status(component)
        if status.state in ("unavailable", "broken"):
            raise UnavailableError(f"{kind} {ref!r} is {status.state}: {'; '.join(status.reasons)}.", fix=status.fix)
        return import_target(component)

    def _find(self, kind: str, ref: str) -> Component | ModelEntry:
        distribution, _, name = ref.rpartition("/")
        bucket = self._items[kind].get(name, [])
        if distribution:
            bucket = [item for item in bucket if item.origin.distribution == distribution]
        if not bucket:
            raise UnknownNameError(
                kind, ref, [r for r, _ in self.items(kind) if not r.startswith("_")], fix=self._where_to_look(kind)
            )
        if len(bucket) > 1 and bucket[0].origin.distribution != BUILT_IN:
            origins = " and ".join(str(item.origin) for item in bucket)
            spellings = " or ".join(f"{item.origin.distribution}/{name}" for item in bucket)
            raise InputError(f"{kind} {name!r} is provided by {origins}.", fix=f"Write {spellings}.")
        return bucket[0]

    def _where_to_look(self, kind: str) -> str:
        fix = f"See: python -m zoo list {KINDS[kind]}."
        if self.broken_plugins:
            fix += f" (Plugins that failed to load: {', '.join(self.broken_plugins)}.)"
        return fix

    def _shortest_reference(self, name: str, item: Component | ModelEntry, bucket: list[Component | ModelEntry]) -> str:
        owns_bare_name = item.origin.distribution == BUILT_IN or len(bucket) == 1
        return name if owns_bare_name else f"{item.origin.distribution}/{name}"

    def _resolve(self, entry: ModelEntry, seen: tuple[str, ...] = ()) -> ModelEntry:
        if entry.extends is None:
            return entry
        if entry.name in seen:
            raise InputError(f"model {entry.name!r} extends itself: {' -> '.join((*seen, entry.name))}.")
        found = self._find("model", entry.extends)
        assert isinstance(found, ModelEntry)
        base = self._resolve(found, (*seen, entry.name))
        return replace(
            entry,
            family=entry.family or base.family,
            spec_values=_merge(base.spec_values, entry.spec_values),
            sources=entry.sources,
            license=entry.license or base.license,
            help=entry.help or base.help,
            extends=None,
        )


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` on top, nested mappings merged; ``None`` removes a key."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def component_status(component: Component) -> Status:
    """Judge a component by installed metadata alone; nothing of it is imported."""
    reasons = [*_unmet_requirements(component.requires), *_unmet_needs(component.needs)]
    if reasons:
        return Status("unavailable", tuple(reasons), component.fix)
    module = component.target.partition(":")[0]
    if not _top_level_exists(module):
        return Status("broken", (f"its target {component.target!r} does not exist",))
    trusted = component.origin.distribution == BUILT_IN and not component.requires
    return Status("ok" if trusted else "unprobed")


def probe(component: Component) -> Status:
    """Judge a component by importing it."""
    status = component_status(component)
    if status.state in ("unavailable", "broken"):
        return status
    try:
        import_target(component)
    except UnavailableError as error:
        return Status("broken", (error.message,), error.fix)
    return Status("ok")


def import_target(component: Component) -> Any:
    """The object behind a component.

    Raises:
        UnavailableError: the import fails, or the module has no such object.
    """
    module, _, name = component.target.partition(":")
    whose = f"{component.kind} {component.name!r} ({component.origin})"
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnavailableError(f"{whose} can not be imported: {reason}.", fix=component.fix) from error
    if not hasattr(imported, name):
        raise UnavailableError(f"{whose} points to {component.target!r}, which does not exist.")
    return getattr(imported, name)


def _unmet_requirements(requirements: Iterable[str]) -> Iterator[str]:
    if not requirements:
        return
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield f"needs {text} (not installed)"
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield f"needs {text} (installed: {installed})"


def _unmet_needs(needs: DeviceNeeds | None) -> Iterator[str]:
    if needs is None:
        return
    import platform

    present = {
        "cuda": Path("/proc/driver/nvidia/version").exists() or platform.system() == "Windows",
        "mps": platform.system() == "Darwin" and platform.machine() == "arm64",
    }
    if not present[needs.accelerator]:
        yield f"needs {needs} (no such device on this machine)"


def _top_level_exists(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
