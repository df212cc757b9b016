"""Finds components and model entries by kind and name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from zoo.errors import InputError, UnavailableError, UnknownNameError
from zoo.registry.availability import component_status, import_target
from zoo.registry.records import BUILT_IN, KINDS, Component, ModelEntry, Origin


class Registry:
    """Components and model entries by kind and name.

    A reference is ``name`` or ``distribution/name``. A built-in's bare name can not be shadowed; a bare name that
    two other distributions share must be written with its distribution.
    """

    def __init__(self) -> None:
        self._items: dict[str, dict[str, list[Component | ModelEntry]]] = {kind: {} for kind in KINDS}
        self.broken_plugins: list[str] = []
        """Names of plugins that failed to load; errors about unknown names mention them."""

    def add(self, *items: Component | ModelEntry) -> None:
        """Register items, all or none.

        Raises:
            InputError: a distribution registers one name of a kind twice.
        """
        taken = set()
        for item in items:
            key = (item.kind, item.name, item.origin.distribution)
            if key in taken or self._of(item.kind, item.name, item.origin):
                raise InputError(f"{item.kind} {item.name!r} is registered twice by {item.origin}.")
            taken.add(key)
        for item in items:
            bucket = self._items[item.kind].setdefault(item.name, [])
            bucket.append(item)
            bucket.sort(key=lambda i: (i.origin.distribution != BUILT_IN, i.origin.distribution))

    def items(self, kind: str) -> Iterator[tuple[str, Component | ModelEntry]]:
        """Every item of a kind with the shortest reference that reaches it, sorted by name."""
        for _, bucket in sorted(self._items[kind].items()):
            for item in bucket:
                yield self._shortest_reference(item), item

    def components(self, kind: str) -> Iterator[tuple[str, Component]]:
        """As `items`, for every kind but models."""
        return ((ref, item) for ref, item in self.items(kind) if isinstance(item, Component))

    def models(self) -> Iterator[tuple[str, ModelEntry]]:
        """Every model that can be used, inheritance resolved; names that begin with ``_`` are bases for others only.

        A built-in that can not be used is our own fault, and raises.
        """
        for ref, item in self.items("model"):
            if not isinstance(item, ModelEntry) or item.name.startswith("_"):
                continue
            if item.origin.distribution == BUILT_IN or self.fault(item) is None:
                yield ref, self._resolve(item)

    def fault(self, item: Component | ModelEntry) -> str | None:
        """Why a registered model can not be used: a base or a family that nobody has, an invalid spec."""
        if not isinstance(item, ModelEntry) or item.name.startswith("_"):
            return None
        try:
            entry = self._resolve(item)
            _ = entry.spec
        except InputError as error:
            return str(error)
        try:
            self._find("family", entry.family)
        except InputError as error:
            return f"model {item.name!r} ({item.origin}): {error}"
        return None

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
            known = [r for r, item in self.items(kind) if not item.name.startswith("_")]
            raise UnknownNameError(kind, ref, known, fix=self._where_to_look(kind))
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

    def _shortest_reference(self, item: Component | ModelEntry) -> str:
        owns_bare_name = item.origin.distribution == BUILT_IN or len(self._items[item.kind][item.name]) == 1
        return item.name if owns_bare_name else f"{item.origin.distribution}/{item.name}"

    def _of(self, kind: str, name: str, origin: Origin) -> Component | ModelEntry | None:
        """What a distribution itself registered under a name."""
        bucket = self._items[kind].get(name, [])
        return next((item for item in bucket if item.origin.distribution == origin.distribution), None)

    def _resolve(self, entry: ModelEntry) -> ModelEntry:
        """The entry with what it inherits.

        In an entry a name means the one of the same distribution, if it has it: what others install can not change it.
        """
        chain = [entry]
        while chain[-1].extends is not None:
            base = self._base_of(chain[-1])
            if any(base is seen for seen in chain):
                names = " -> ".join(link.name for link in (*chain, base))
                raise InputError(f"model {entry.name!r} ({entry.origin}) inherits in a circle: {names}.")
            chain.append(base)
        values: dict[str, Any] = {}
        for link in reversed(chain):
            values = _merge(values, link.spec_values)
        return replace(
            entry,
            family=next((self._family_of(link) for link in chain if link.family), ""),
            spec_values=values,
            license=next((link.license for link in chain if link.license), ""),
            help=next((link.help for link in chain if link.help), ""),
            extends=None,
        )

    def _family_of(self, entry: ModelEntry) -> str:
        own = self._of("family", entry.family, entry.origin)
        return self._shortest_reference(own) if own else entry.family

    def _base_of(self, entry: ModelEntry) -> ModelEntry:
        assert entry.extends is not None
        found = self._of("model", entry.extends, entry.origin)
        if found is None or found is entry:
            try:
                found = self._find("model", entry.extends)
            except InputError as error:
                message = f"model {entry.name!r} ({entry.origin}) extends {entry.extends!r}: {error.message}"
                raise InputError(message, fix=error.fix) from None
        assert isinstance(found, ModelEntry)
        return found


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
