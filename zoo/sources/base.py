"""What a source is, and the one way to fetch from one: whole, verified and recorded, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from zoo.errors import InputError, UnavailableError, ZooError
from zoo.registry import Component, ModelEntry, Registry
from zoo.sources.address import Source, brief
from zoo.sources.provenance import Provenance, digest_weights, read_provenance, write_provenance

Report = Callable[[str], None]
"""Takes one line for a person to read."""

_MARKER = ".source"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class SourceError(ZooError):
    """This source can not give the model now; another may."""


@dataclass(frozen=True)
class FetchOptions:
    """What the user said about fetching."""

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Fetched:
    """What a fetch learnt about the files that it brought."""

    address: str
    """The address with its revision resolved, so that it names the same bytes for ever."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests that the source promises, by path in the directory. They are checked, the fetch need not."""


class Fetch(Protocol):
    """A source."""

    def __call__(self, address: str, destination: Path, options: FetchOptions) -> Fetched | None:
        """Bring the files of the model at ``address`` (what follows the scheme) into the directory ``destination``.

        ``destination`` does not exist yet or is empty; for a fetch that is marked with `resumes` it may hold what an
        interrupted fetch of the same address left. ``None``: nothing is known beyond the address as it was given.

        Raises:
            SourceError: the address can not be had from here: no network, no permission, nothing there.
            InputError: the address is malformed.
            OSError: the disk is full or can not be written.
        """


_F = TypeVar("_F", bound=Callable[..., Any])


def resumes(fetch: _F) -> _F:
    """Mark a fetch that goes on from what an interrupted fetch of the same address left in ``destination``."""
    fetch.__dict__["resumes"] = True
    return fetch


def find_source(source: Source, registry: Registry) -> Component:
    """The component for the source's scheme.

    Raises:
        InputError: no source has this scheme.
    """
    component = registry.match("source", source.scheme)
    if component is None:
        known = sorted(f"{scheme}:" for _, c in registry.components("source") for scheme in c.matches)
        raise InputError(
            f"{str(source)!r} has the scheme '{source.scheme}:', which no source reads.",
            fix=f"Known: {', '.join(known)}; a plugin can add others.",
        )
    return component


def require_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Refuse a fetch that can not fit.

    Raises:
        ZooError: the disk that ``directory`` is on has less than ``needed_bytes`` free.
    """
    free = _free_bytes(directory)
    if needed_bytes > free:
        raise ZooError(
            f"{what} needs {_size(needed_bytes)}, and the disk of {directory.parent} has {_size(free)} free.",
            fix="Free some space, or choose a directory on another disk.",
        )


def _ignore(line: str) -> None:
    pass


def fetch_model(
    model: ModelEntry | Sequence[str],
    destination: Path,
    options: FetchOptions,
    registry: Registry,
    report: Report = _ignore,
    *,
    what: str = "the model",
) -> str:
    """Bring a model's files into ``destination`` from the first of its sources that can give them.

    ``destination`` appears complete, with its ``zoo.yaml``, or not at all. Processes that want the same one wait
    for each other.

    Args:
        model: a registry entry, or its sources, best first.
        destination: a directory that is not there yet, or is empty.
        what: what messages call something that is no registry entry.

    Returns:
        The source that worked, as it was given.

    Raises:
        InputError: there is no source, one has an unknown scheme, or ``destination`` is taken.
        UnavailableError: the only source can not be used on this machine.
        ZooError: no source could give the model (each is listed with its reason), or the disk is full.
    """
    name, sources = (model.name, model.sources) if isinstance(model, ModelEntry) else (None, tuple(model))
    if not sources:
        raise InputError(f"model {name!r} has no source for its weights.", fix="Give the path of a model directory.")
    failures: list[tuple[str, ZooError]] = []
    with _alone(destination, report):
        if there := _already_there(destination, sources):
            return there
        for source, following in zip(sources, (*sources[1:], None), strict=True):
            try:
                _fetch_whole(name, Source.parse(source), destination, options, registry)
                return source
            except (SourceError, UnavailableError) as error:
                failures.append((source, error))
                if following:
                    report(f"{brief(source)}: {error.message} Trying {brief(following)}.")
    raise _no_source_worked(f"model {name!r}" if name else what, failures)


def _fetch_whole(
    name: str | None, source: Source, destination: Path, options: FetchOptions, registry: Registry
) -> None:
    """Fetch into a sibling directory, verify, record, and rename."""
    component = find_source(source, registry)
    fetch: Fetch = registry.load("source", f"{component.origin.distribution}/{component.name}")
    partial = destination.parent / f".{destination.name}.partial"
    try:
        _prepare(partial, f"{source}\n{options.revision or ''}\n" if hasattr(fetch, "resumes") else None)
        fetched = fetch(str(source.address), partial, options) or Fetched(str(source.address))
        (partial / _MARKER).unlink(missing_ok=True)
        _record(name, source.scheme, fetched, partial)
        if destination.is_dir():
            destination.rmdir()
        partial.rename(destination)
    except OSError as error:
        raise _from_os_error(error, source, destination) from error
    finally:
        if not (hasattr(fetch, "resumes") and _worth_keeping(partial)):
            shutil.rmtree(partial, ignore_errors=True)


def _prepare(partial: Path, marker: str | None) -> None:
    """An empty ``partial``, or the one that an interrupted fetch with the same marker left."""
    marker_file = partial / _MARKER
    if marker is None or not marker_file.is_file() or marker_file.read_text(encoding="utf-8") != marker:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        if marker is not None:
            marker_file.write_text(marker, encoding="utf-8")


def _record(name: str | None, scheme: str, fetched: Fetched, partial: Path) -> None:
    if not any(path.is_file() for path in partial.rglob("*")):
        raise SourceError(f"{scheme}:{fetched.address} brought no files.")
    try:
        digests = digest_weights(partial, fetched.sha256)
    except ZooError:
        shutil.rmtree(partial)  # or the damaged file would be taken for a finished one
        raise
    write_provenance(partial, Provenance(f"{scheme}:{fetched.address}", name, digests))


def _worth_keeping(partial: Path) -> bool:
    """Whether it holds any file but bookkeeping, which has a dot in front."""
    files = (path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
    return any(not part.startswith(".") for path in files for part in path.parts[:1])


@contextmanager
def _alone(destination: Path, report: Report) -> Iterator[None]:
    """Keep other processes, such as the other ranks of a run, from fetching to the same place meanwhile."""
    from filelock import FileLock, Timeout

    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(destination.parent / f".{destination.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"Another process is fetching {destination}; waiting for it.")
            lock.acquire()
    except OSError as error:
        raise ZooError(f"can not write to {destination.parent}: {error.strerror}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _already_there(destination: Path, sources: Sequence[str]) -> str | None:
    """The source that ``destination`` was fetched from meanwhile; ``None`` if it is free."""
    if not os.path.lexists(destination) or (destination.is_dir() and not any(destination.iterdir())):
        return None
    if destination.is_dir() and (recorded := read_provenance(destination).source):
        for source in sources:
            if Source.parse(source).may_be(Source.parse(recorded)):
                return source
    raise InputError(f"{destination} is there already.", fix="Use it by its path, or remove it.")


def _from_os_error(error: OSError, source: Source, destination: Path) -> ZooError:
    """Tell the disk's faults, which every source would meet, from the network's."""
    if error.errno in _DISK_FULL:
        free = _free_bytes(destination)
        return ZooError(
            f"the disk of {destination.parent} filled up while fetching {source}; it has {_size(free)} free.",
            fix="Free some space, or choose a directory on another disk.",
        )
    if error.errno in _NOT_WRITABLE:
        return ZooError(f"can not write {error.filename or destination}: {error.strerror}.")
    return SourceError(f"{type(error).__name__}: {' '.join(str(error).split())}.")


def _no_source_worked(what: str, failures: Sequence[tuple[str, ZooError]]) -> ZooError:
    if len(failures) == 1:
        source, error = failures[0]
        if isinstance(error, UnavailableError):
            return error
        return ZooError(f"can not fetch {what} from {brief(source)}: {error.message}", fix=error.fix)
    lines = [f"{brief(source)}: {error}" for source, error in failures]
    return ZooError(f"none of the {len(failures)} sources of {what} worked:\n  " + "\n  ".join(lines))


def _free_bytes(directory: Path) -> int:
    """Free bytes on the disk that ``directory``, which need not exist, is or would be on."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(n_bytes: int) -> str:
    amount = float(n_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"
