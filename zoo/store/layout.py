"""The directory of a store: how its entries are named, which steps it holds, and what is no store."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import InputError
from zoo.store.files import Damage
from zoo.store.lock import WriteLock
from zoo.store.manifest import FILE_NAME, Manifest, damages, read_manifest, verify

LOCK = ".lock"
_STEP = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"\.replaced-(\d{8,})-\w+")
_LOOKS = 10
"""How often a reader looks again when another process has deleted a step under its eyes."""
_LEFTOVERS = (".tmp-", ".trash-")


@dataclass(frozen=True)
class Step:
    """A committed step: a directory with a manifest, and files of the sizes that it says."""

    step: int
    path: Path
    manifest: Manifest

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured when it was saved."""
        return self.manifest.metrics

    def to_json(self) -> list[Any]:
        """For the other ranks, who see the same store."""
        return [self.path.name, self.manifest.to_json()]

    @classmethod
    def from_json(cls, root: Path, content: list[Any]) -> Step:
        """What `to_json` gave."""
        manifest = Manifest.from_json(content[1])
        return cls(manifest.step, root / content[0], manifest)


@dataclass(frozen=True)
class Listing:
    """What a store holds."""

    steps: list[Step]
    """Oldest save first."""
    damaged: dict[Path, list[str]]
    """Directories that are named as steps and can not be used, with the reasons."""


def step_name(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def temporary_name(step: int, nonce: str) -> str:
    """Where a step is written before it is committed."""
    return f".tmp-{step:08d}-{nonce}"


def replaced_name(step: int, nonce: str) -> str:
    """Where a step waits while a new one takes its name."""
    return f".replaced-{step:08d}-{nonce}"


def trash_name(directory: Path, nonce: str) -> str:
    """Where a step goes to be deleted."""
    return f".trash-{directory.name.lstrip('.')}-{nonce}"


def step_directories(root: Path) -> dict[Path, int]:
    """Directories that should hold a step.

    One that is being replaced counts while its successor is not in place: between two renames, or after a crash there.
    """
    named = {path: int(match[1]) for path in _entries(root) if (match := _STEP.fullmatch(path.name))}
    replaced = {path: int(match[1]) for path in _entries(root) if (match := _REPLACED.fullmatch(path.name))}
    return named | {path: step for path, step in replaced.items() if step not in named.values()}


def listing(root: Path) -> Listing:
    """The steps of a store, judged by their manifests and the sizes of their files; no content is read.

    Raises:
        NewerFormatError: a later version of zoo wrote one.
    """
    for _ in range(_LOOKS):
        steps, damaged = [], {}
        for path, step in sorted(step_directories(root).items()):
            try:
                manifest = read_manifest(path, step)
                problems = damages(path, manifest.files)
            except Damage as damage:
                problems = [str(damage)]
            if problems:
                damaged[path] = problems
            else:
                steps.append(Step(step, path, manifest))
        if all(path.exists() for path in damaged):
            break
    return Listing(sorted(steps, key=lambda step: step.manifest.sequence), damaged)


def check_is_store(root: Path, *, must_exist: bool) -> None:
    """Refuse a directory that is something else.

    Args:
        must_exist: whether a directory that is not there is an error; a store is made by its first save.

    Raises:
        InputError: it is a file, a step, or has content of another kind.
    """
    fix = "Name the directory of a store, or one that is new or empty."
    if root.is_file():
        raise InputError(f"{root} is a file, not a checkpoint store.", fix=fix)
    if not root.exists():
        if must_exist:
            raise InputError(f"{root}: no such directory.", fix="Name the directory that the steps were saved in.")
        return
    names = sorted(path.name for path in _entries(root))
    if FILE_NAME in names and _STEP.fullmatch(root.name):
        raise InputError(f"{root} is one step of a checkpoint store.", fix=f"Name the store: {root.parent}.")
    ours = [name for name in names if name == LOCK or _STEP.fullmatch(name) or _REPLACED.fullmatch(name)]
    names = [name for name in names if not name.startswith(".")]
    if names and not ours:
        inside = next((path for path in _entries(root) if path.is_dir() and any(path.glob("step-*"))), None)
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(
            f"{root} is no checkpoint store: it holds {some}, and no step-*.",
            fix=f"The store in it is {inside}." if inside else fix,
        )


def verify_all(root: Path) -> dict[str, list[str]]:
    """Read every byte of every step: what is wrong, by the name of its directory."""
    return {path.name: verify(path, step) for path, step in sorted(step_directories(root).items())}


def hold(root: Path, *, lock: bool) -> WriteLock | None:
    """Make the directory, take the right to write into it, and remove what an interrupted process left there.

    Raises:
        StoreLockedError: another process writes it.
        InputError: it can not be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root} can not be made: {error.strerror}.", fix="Name a directory that can.") from None
    held = WriteLock(root / LOCK) if lock else None
    if held is None or held.is_first:
        clean(root)
    return held


def clean(root: Path) -> None:
    """Remove what an interrupted process left. Only for who holds the lock: a save in progress looks the same."""
    for path in _entries(root):
        if match := _REPLACED.fullmatch(path.name):
            successor = root / step_name(int(match[1]))
            path.rename(root / trash_name(path, "0") if successor.exists() else successor)
    for path in _entries(root):
        if path.name.startswith(_LEFTOVERS):
            shutil.rmtree(path, ignore_errors=True)


def _entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []
