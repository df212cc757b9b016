"""Loading a step: the newest that verifies, read and compared in full by every rank before the first object changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import InputError, ZooError
from zoo.store.changes import Change, NotTakenBackError, RngChange, apply_all, changes_for, undo_all
from zoo.store.commit import versions
from zoo.store.files import Damage
from zoo.store.layout import Step, listing, step_name
from zoo.store.manifest import Manifest, read_manifest, unexpected
from zoo.store.matching import check_has_values
from zoo.store.parts import MODEL
from zoo.store.ranks import PATIENCE_S, Exchange, Procedure
from zoo.store.reading import Loading, read_step
from zoo.store.state import unwrap

_LOG = logging.getLogger(__name__)
_LISTINGS = 10
"""How often a loader looks again when another process has deleted or replaced the step that it was reading."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded."""

    step: int
    path: Path
    metrics: Mapping[str, float]
    skipped: list[str] = field(default_factory=list)
    """Steps that would have come first and can not be used, with the reasons."""
    notes: list[str] = field(default_factory=list)
    """What may make the run go on differently: another version of torch, other devices."""


@dataclass
class _Read:
    """What one rank made of one step."""

    problems: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    rng: list[RngChange] = field(default_factory=list)
    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)
    refusal: ZooError | None = None


def load(loading: Loading, state: dict[str, Any]) -> Procedure[Loaded]:
    """Load the step that is asked for into the state. See `zoo.store.store.CheckpointStore.load`."""
    skipped: list[str] = []
    for _ in range(_LISTINGS):
        payloads = yield Exchange("load", _candidates(loading) if loading.rank == 0 else None, {"which": loading.which})
        first = payloads[0]
        if "refusal" in first:
            raise InputError(first["refusal"], fix=first["fix"])
        skipped = list(first["skipped"])
        for name, step in first["candidates"]:
            read = _read(loading, loading.root / name, step, state)
            payloads = yield Exchange("load: read", _report(loading.root / name, read), {"step": step}, PATIENCE_S)
            _raise_refusals(payloads, read.refusal)
            if any(payload["has_gone"] for payload in payloads):
                break
            if problems := list(dict.fromkeys(problem for other in payloads for problem in other["problems"])):
                skipped.append(f"{name}: {'; '.join(problems)}")
                continue
            return (yield from _apply(loading, name, read, skipped))
        else:
            break
    raise ZooError(
        f"no step of {loading.root} can be loaded. {'. '.join(skipped)}.",
        fix="Name another store, or start anew in an empty directory.",
    )


def _candidates(loading: Loading) -> dict[str, Any]:
    """On rank 0: the directories to try, best first, and those that are out of the question already."""
    try:
        found = listing(loading.root)
        skipped = [f"{path.name}: {'; '.join(problems)}" for path, problems in found.damaged.items()]
        if type(loading.which) is int:
            steps = _exact(loading, loading.which, found.steps, skipped)
            skipped = []
        elif loading.which == "best":
            steps = _by_metric(loading, found.steps)
        else:
            steps = found.steps[::-1]
        if not steps and not skipped:
            raise InputError(f"{loading.root} holds no step yet.", fix="Save one, or name another directory.")
    except ZooError as error:
        return {"refusal": error.message, "fix": error.fix}
    return {"candidates": [[step.path.name, step.step] for step in steps], "skipped": skipped}


def _exact(loading: Loading, which: int, steps: list[Step], skipped: list[str]) -> list[Step]:
    chosen = [step for step in steps if step.step == which]
    if not chosen:
        numbers = sorted(step.step for step in steps)
        reasons = [text for text in skipped if text.startswith(f"{step_name(which)}:")]
        problem = f"can not be used. {reasons[0]}" if reasons else "is not there"
        raise InputError(
            f"step {which} of {loading.root} {problem}.",
            fix=f"There are the steps {', '.join(map(str, numbers))}." if numbers else None,
        )
    return chosen


def _by_metric(loading: Loading, steps: list[Step]) -> list[Step]:
    if loading.best is None:
        raise InputError("which='best': the store does not know by what.", fix='Open it with keep_best="val_loss".')
    ranked = loading.best.ranked(steps)
    if steps and not ranked:
        known = sorted({name for step in steps for name in step.metrics})
        raise InputError(
            f"no step of {loading.root} was saved with the metric {loading.best.metric!r}.",
            fix=f"There are {', '.join(known)}." if known else "Save with metrics={...}.",
        )
    return ranked


def _read(loading: Loading, directory: Path, step: int, state: dict[str, Any]) -> _Read:
    """Read and compare everything, and change nothing."""
    read = _Read()
    try:
        read.manifest = manifest = read_manifest(directory, step)
        _check_run(loading, manifest, state)
        stored = read_step(directory, manifest, state, loading)
        changes = changes_for(state, stored.state, stored.optimizers, check_finite=loading.check_finite)
        rng = [] if stored.rng is None else [RngChange(stored.rng)]
        read.changes, read.rng = [*changes, *rng], rng
        read.notes = _notes(loading, directory, manifest)
    except Damage as damage:
        read.problems.extend(damage.args)
    except ZooError as error:
        read.refusal = error
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        read.refusal = ZooError(f"{directory} can not be loaded: {type(error).__name__}: {error}")
        read.refusal.__cause__ = error
    return read


def _check_run(loading: Loading, manifest: Manifest, state: dict[str, Any]) -> None:
    """Refuse another run's step, and one with other contents than asked for."""
    refuse_other_identity(loading.identity, manifest.identity, step_name(manifest.step))
    check_has_values(unwrap(state.get(MODEL)))
    there = [*manifest.shared, *manifest.per_rank]
    if missing := [key for key in state if key not in there]:
        raise InputError(
            f"{step_name(manifest.step)} holds no {', '.join(map(repr, missing))}; it holds {', '.join(there)}.",
            fix="Ask for what it holds.",
        )
    if (unasked := [key for key in there if key not in state]) and not loading.partial:
        raise InputError(
            f"{step_name(manifest.step)} also holds {', '.join(map(repr, unasked))}: the state does not ask for it.",
            fix="To resume, name all of it; to take only a part, say partial=True.",
        )
    if manifest.world_size != loading.world_size and not loading.other_world_size and not loading.partial:
        raise InputError(
            f"{step_name(manifest.step)} was saved by {manifest.world_size} ranks; {loading.world_size} load it.",
            fix="With other_world_size=True every rank goes on from what rank 0 had of its own, such as the position "
            "in the data, and from the random generators that it has now.",
        )


def refuse_other_identity(mine: Any, theirs: Any, name: str) -> None:
    """Compare what two runs say they are, if both do.

    Raises:
        InputError: they differ; the message says where.
    """
    if mine is None or theirs is None or mine == theirs:
        return
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        difference = "; ".join(f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here" for key in keys)
    else:
        difference = f"it is {theirs!r}, and this run is {mine!r}"
    raise InputError(f"{name} is of another run: {difference}.", fix="Name that run's own directory.")


def _notes(loading: Loading, directory: Path, manifest: Manifest) -> list[str]:
    notes = unexpected(directory, manifest) if loading.rank == 0 else []
    now = versions()
    for name in ("torch", "numpy"):
        if manifest.versions.get(name) != now[name]:
            notes.append(
                f"saved with {name} {manifest.versions.get(name)}, loaded with {now[name]}: results may differ."
            )
    if manifest.world_size != loading.world_size:
        notes.append(f"saved by {manifest.world_size} ranks: the random generators were not loaded.")
    return notes


def _report(path: Path, read: _Read) -> dict[str, Any]:
    refusal = {"message": read.refusal.message, "fix": read.refusal.fix} if read.refusal else None
    return {"problems": read.problems, "refusal": refusal, "has_gone": bool(read.problems) and _has_gone(path, read)}


def _has_gone(path: Path, read: _Read) -> bool:
    """Whether another process has deleted or replaced the step since its manifest was read here."""
    try:
        return read.manifest is not None and read_manifest(path) != read.manifest
    except Damage:
        return not path.exists()


def _raise_refusals(payloads: list[Any], own: ZooError | None, before: str = "") -> None:
    refusals = {rank: payload["refusal"] for rank, payload in enumerate(payloads) if payload["refusal"]}
    if not refusals:
        return
    same = len({refusal["message"] for refusal in refusals.values()}) == 1 and len(refusals) == len(payloads)
    said = "; ".join(r["message"] if same else f"rank {rank}: {r['message']}" for rank, r in refusals.items())
    first = next(iter(refusals.values()))
    kind = type(own) if isinstance(own, InputError) else ZooError
    raise kind(before + (first["message"] if same else said), fix=first["fix"]) from (own and own.__cause__)


def _apply(loading: Loading, name: str, read: _Read, skipped: list[str]) -> Procedure[Loaded]:
    """Change all objects on all ranks, or none on any."""
    own: ZooError | None = None
    try:
        apply_all(read.changes)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        own = error if isinstance(error, ZooError) else ZooError(f"{type(error).__name__}: {error}")
        own.__cause__ = error.__cause__ if own is error else error
    refusal = {"message": own.message, "fix": None} if own else None
    is_clean = not isinstance(own, NotTakenBackError)
    report = {"refusal": refusal, "is_clean": is_clean}
    payloads = yield Exchange("load: applied", report, {"name": name}, PATIENCE_S)
    if own is None and any(payload["refusal"] for payload in payloads):
        undo_all(read.changes)
    state = ", all is as it was" if all(payload["is_clean"] for payload in payloads) else ""
    _raise_refusals(payloads, own, f"nothing was loaded from {name}{state}: ")
    assert read.manifest is not None
    for text in skipped if loading.rank == 0 else ():
        _LOG.warning("skipped %s", text)
    notes = [*read.notes, *(note for change in read.rng for note in change.notes)]
    manifest = read.manifest
    return Loaded(manifest.step, loading.root / name, manifest.metrics, skipped, notes)
