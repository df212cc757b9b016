"""Where each rank is, in words: what a post says, and in what the posts of several ranks differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Json: TypeAlias = Any
"""What ``json.dumps`` takes: null, numbers, strings, and lists and dicts of them."""

_LONG = 200
"""Characters of a fingerprint that travel as they are; of a longer one its hash does."""
_SHOWN = 3
"""Differences that a message names."""


@dataclass(frozen=True)
class Place:
    """One call of the fence: its kind, its number from 1, and the fingerprint that the ranks must share."""

    kind: str
    number: int
    fingerprint: Json = None

    def __str__(self) -> str:
        facts = [f"call {self.number}"]
        if isinstance(self.fingerprint, dict):
            facts += [f"{k} {v}" for k, v in self.fingerprint.items() if not isinstance(v, dict | list)]
        return f"{self.kind!r} ({', '.join(facts)})"


@dataclass(frozen=True)
class Post:
    """What one rank says in one call. ``shown`` is its fingerprint, or the hash of a long one."""

    kind: str
    shown: str
    payload: Json

    @property
    def is_hashed(self) -> bool:
        """Whether the fingerprint itself is in the store under a key of its own."""
        return self.shown.startswith("sha256:")

    def encode(self) -> str:
        """One line of JSON."""
        return json.dumps([self.kind, self.shown, self.payload])

    @classmethod
    def decode(cls, text: bytes) -> Post:
        """The inverse of `encode`."""
        return cls(*json.loads(text))


def canonical(fingerprint: Json) -> tuple[str, str]:
    """A fingerprint as JSON with sorted keys, and what of it is shown to the other ranks."""
    text = json.dumps(fingerprint, sort_keys=True)
    return text, text if len(text) <= _LONG else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def names(ranks: Iterable[int]) -> str:
    """``rank 1``, or ``ranks 0, 2``; of many the first ones."""
    ordered = sorted(ranks)
    if len(ordered) == 1:
        return f"rank {ordered[0]}"
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return f"ranks {', '.join(map(str, ordered[:8]))}{more}"


def disagreement(places: Mapping[int, Place]) -> tuple[str, str]:
    """In what the ranks differ, and what to do about it. All places have the same number."""
    number = next(iter(places.values())).number
    if len({place.kind for place in places.values()}) > 1:
        where = _by_value({rank: str(place) for rank, place in places.items()}, "{ranks} {is_are} at {value}")
        return f"the ranks disagree at call {number}: {where}.", remedy({p.kind for p in places.values()})
    kind = next(iter(places.values())).kind
    differences = _differences({rank: place.fingerprint for rank, place in places.items()})
    message = f"the ranks disagree in {kind!r} (call {number}): {'; '.join(differences)}."
    return message, (
        "All ranks must be at the same step with the same names, dtypes and shapes: build the model alike on every "
        "rank, and decide when to save from data that every rank has."
    )


def remedy(kinds: Iterable[str]) -> str:
    """What to do when not all ranks make the same call."""
    kinds = set(kinds)
    special = sorted(kinds - {"step", "end"})
    if special:
        uneven = " Before it, all ranks must take the same number of steps." if "step" in kinds else ""
        return f"Checkpoint calls are collective: call {special[0]}() on every rank, outside `if rank == 0`.{uneven}"
    return (
        "All ranks must take the same number of steps: stop when the gathered posts say so, not when one rank is done."
    )


def _differences(fingerprints: Mapping[int, Json]) -> list[str]:
    flat = {rank: dict(_leaves(fingerprint)) for rank, fingerprint in fingerprints.items()}
    paths = list(dict.fromkeys(path for leaves in flat.values() for path in leaves))
    found = []
    for path in paths:
        values = {rank: leaves.get(path, "nothing") for rank, leaves in flat.items()}
        if len(set(values.values())) > 1:
            found.append(f"{path or 'the fingerprint'}: {_by_value(values, '{ranks} {has_have} {value}')}")
    more = [f"and {len(found) - _SHOWN} more differences"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more


def _leaves(value: Json, path: str = "") -> Iterable[tuple[str, str]]:
    if not isinstance(value, dict):
        yield path, json.dumps(value)
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def _by_value(values: Mapping[int, str], form: str) -> str:
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    return ", ".join(
        form.format(
            ranks=names(ranks),
            is_are="is" if len(ranks) == 1 else "are",
            has_have="has" if len(ranks) == 1 else "have",
            value=value,
        )
        for value, ranks in groups.items()
    )
