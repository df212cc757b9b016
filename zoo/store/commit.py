"""Saving a step in two phases: every rank writes and says how it went, then rank 0 makes the step appear at once.

Whatever happens before the rename, and a ``kill -9`` at any moment, leaves the earlier steps as they were. What the
ranks do together is a generator that yields its exchanges: one text for a save that waits and one in the background.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo.errors import InputError, ZooError
from zoo.store.files import FileRecord, sync_directory
from zoo.store.layout import Step, listing, replaced_name, step_name, temporary_name, trash_name
from zoo.store.manifest import Manifest, damages
from zoo.store.parts import ModelFiles, Parts, fingerprint, not_finite, write_parts
from zoo.store.ranks import PATIENCE_S, Exchange, Procedure
from zoo.store.retention import Best, expendable

_VISIBLE_WITHIN_S = 10.0
"""How long a network file system may take to show rank 0 what another machine wrote."""
_FIXES = {
    errno.ENOSPC: "Free some space on that disk, or save somewhere else.",
    errno.EDQUOT: "The quota is used up: delete something, or save somewhere else.",
    errno.EFBIG: "The file is larger than this process may write: see ulimit -f.",
    errno.EACCES: "Make that directory writable, or save somewhere else.",
    errno.EROFS: "That file system is mounted read-only: save somewhere else.",
}


class SaveError(ZooError):
    """A step was not saved. The message says which rank failed and how; steps saved earlier are as they were."""


@dataclass(frozen=True)
class Saving:
    """One save of one rank."""

    root: Path
    step: int
    rank: int
    world_size: int
    metrics: Mapping[str, Any]
    identity: Any = None
    keep: int | None = None
    best: Best | None = None
    needed: frozenset[int] = frozenset()
    """Steps that retention leaves alone."""
    files: ModelFiles | None = None
    background: bool = False
    trash: list[Path] = field(default_factory=list)
    """What retention has put out of sight, and the caller deletes when the training goes on."""


def announce(saving: Saving, prepare: Callable[[], Parts]) -> Procedure[tuple[Parts, str]]:
    """Before anything is written: every rank is here, with a state that can be saved and is shaped alike.

    Returns:
        What this rank writes, and a nonce that all ranks share.

    Raises:
        SaveError: on one rank the state can not be saved, or it differs from that of rank 0.
    """
    mine: Parts | None = None
    payload: dict[str, Any] = {}
    try:
        _as_floats(saving.metrics)
        parts = prepare()
        mine = parts.for_rank(saving.rank)
        if saving.background:
            mine = mine.snapshot()
        payload = {"layout": parts.layout(), "nonce": secrets.token_hex(4)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        payload = {"error": _report(error)}
    payloads = yield Exchange("save", payload, {"step": saving.step})
    _raise_errors(saving.step, payloads)
    assert mine is not None
    first = payloads[0]["layout"]
    for rank, other in enumerate(payloads):
        layout = other["layout"]
        if differing := sorted(key for key in {**first, **layout} if first.get(key) != layout.get(key)):
            raise SaveError(
                f"step {saving.step} was not saved: {', '.join(differing)} of rank {rank} differ from rank 0's in "
                f"their keys, shapes or dtypes.",
                fix="All ranks train the same model with the same optimizer.",
            )
    return mine, payloads[0]["nonce"]


def write_and_commit(saving: Saving, parts: Parts, nonce: str) -> Procedure[Step]:
    """Write this rank's files, meet, and let rank 0 commit the step.

    Raises:
        SaveError: a rank failed; nothing is left of this step.
    """
    temporary = saving.root / temporary_name(saving.step, nonce)
    where = {"step": saving.step}
    written = _attempt(lambda: _write(saving, parts, temporary))
    payloads = yield Exchange("save: written", written, where, PATIENCE_S)
    committed: dict[str, Any] = {}
    if saving.rank == 0:
        if not any("error" in payload for payload in payloads):
            committed = _attempt(lambda: _commit(saving, parts, temporary, nonce, payloads))
        if "manifest" not in committed:
            shutil.rmtree(temporary, ignore_errors=True)
    _raise_errors(saving.step, payloads)
    payloads = yield Exchange("save: committed", committed, where, PATIENCE_S)
    _raise_errors(saving.step, payloads)
    if saving.rank == 0:
        retain(saving)
    if saving.background:
        delete(saving.trash)
    manifest = Manifest.from_json(payloads[0]["manifest"])
    return Step(saving.step, saving.root / step_name(saving.step), manifest)


def retain(saving: Saving) -> None:
    """Put the steps out of sight that need not be kept."""
    if saving.keep is None:
        return
    nonce = secrets.token_hex(4)
    needed = {*saving.needed, saving.step}
    for step in expendable(listing(saving.root).steps, saving.keep, saving.best, needed):
        saving.trash.append(step.path.rename(saving.root / trash_name(step.path, nonce)))


def delete(trash: list[Path]) -> None:
    """Delete for good. What can not be deleted, the next process to write here sweeps."""
    for path in trash:
        shutil.rmtree(path, ignore_errors=True)


def _commit(saving: Saving, parts: Parts, temporary: Path, nonce: str, payloads: list[Any]) -> dict[str, Any]:
    """On rank 0: the manifest, and one rename that makes it a step."""
    files = {name: FileRecord(*record) for payload in payloads for name, record in payload["files"].items()}
    _check_visible(temporary, files)
    manifest = Manifest(
        step=saving.step,
        sequence=1 + max((step.manifest.sequence for step in listing(saving.root).steps), default=0),
        world_size=saving.world_size,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        shared=parts.shared_keys,
        per_rank=parts.own_keys,
        files=files,
        metrics=_as_floats(saving.metrics),
        identity=saving.identity,
        parameters=fingerprint(parts.model) if parts.model else None,
        not_finite=payloads[0]["not_finite"],
    )
    manifest.write(temporary)
    sync_directory(temporary)
    final, replaced = step_name(saving.step), replaced_name(saving.step, nonce)
    _put_in_place(temporary, saving.root / final, saving.root / replaced, saving.trash)
    return {"manifest": manifest.to_json()}


def _put_in_place(temporary: Path, final: Path, replaced: Path, trash: list[Path]) -> None:
    """Make a directory the step. Between the two renames of a step that is saved again, loaders take the old one."""
    is_again = final.exists()
    if is_again:
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if is_again:
            replaced.rename(final)
        raise
    sync_directory(final.parent)
    if is_again:
        trash.append(replaced.rename(final.parent / trash_name(replaced, "0")))


def _check_visible(temporary: Path, files: Mapping[str, FileRecord]) -> None:
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while problems := damages(temporary, files):
        if time.monotonic() > until:
            raise ZooError(
                f"what other ranks wrote is not there for rank 0: {problems[0]}.",
                fix="The store must be on a file system that all machines share.",
            )
        time.sleep(0.1)


def versions() -> dict[str, str]:
    """What this step was written with."""
    import platform

    import numpy as np
    import torch

    from zoo import __version__

    return {
        "zoo": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, AttributeError, RuntimeError):
        raise InputError(f"metrics={metrics!r} are not numbers by name.", fix='Example: {"val_loss": 2.1}.') from None


def _write(saving: Saving, parts: Parts, temporary: Path) -> dict[str, Any]:
    """This rank's files, and which parameters are not finite; that is found out while the disk is at work."""
    with ThreadPoolExecutor(1, thread_name_prefix="finite") as thread:
        wrong = thread.submit(not_finite, parts)
        files = write_parts(temporary, parts, saving.rank, saving.files)
        records = {name: [record.n_bytes, record.sha256] for name, record in files.items()}
        return {"files": records, "not_finite": wrong.result()}


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives, or a report of what went wrong: it must reach the others either way."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        return {"error": _report(error)}


def _report(error: Exception) -> dict[str, Any]:
    fix = error.fix if isinstance(error, ZooError) else _FIXES.get(getattr(error, "errno", None) or 0)
    message = error.message if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"
    return {"message": message, "fix": fix, "traceback": traceback.format_exc()}


def _raise_errors(step: int, payloads: list[Any]) -> None:
    errors = {rank: payload["error"] for rank, payload in enumerate(payloads) if payload and "error" in payload}
    if not errors:
        return
    who = {rank: f"rank {rank}: " if len(payloads) > 1 else "" for rank in errors}
    said = "; ".join(f"{who[rank]}{error['message']}" for rank, error in errors.items())
    fix = next((error["fix"] for error in errors.values() if error["fix"]), None)
    raised = SaveError(f"step {step} was not saved, earlier steps are as they were. {said.rstrip('.')}.", fix=fix)
    for rank, error in errors.items():
        raised.add_note(f"On rank {rank}:\n{error['traceback']}")
    raise raised
