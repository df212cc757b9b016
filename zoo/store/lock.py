"""One process at a time writes a store: a lock that the operating system gives up when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from zoo.errors import InputError, ZooError


class StoreLockedError(ZooError):
    """Another process writes this store."""


class WriteLock:
    """The right to write into a directory, held from construction to `release`, or to the end of the process.

    It is a POSIX record lock: a forked child, such as a worker of a data loader that outlives a killed trainer, does
    not inherit it. Within one process it may be taken several times. On systems without ``fcntl`` it holds nothing.

    Raises:
        StoreLockedError: another process holds it; the message names it.
        InputError: the directory can not be written, or its file system has no locks.
    """

    _held: dict[Path, tuple[int, int, int]] = {}  # noqa: RUF012 - of the process: path to pid, descriptor, count
    _guard = threading.Lock()

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._pid = os.getpid()
        self._released = False
        with self._guard:
            pid, descriptor, count = self._held.get(self._path, (self._pid, -1, 0))
            if pid != self._pid:  # a forked child has its parent's entry, and not its lock
                os.close(descriptor)
                count = 0
            self.is_first = count == 0
            if self.is_first:
                descriptor = _lock(self._path)
            self._held[self._path] = (self._pid, descriptor, count + 1)

    @property
    def is_held(self) -> bool:
        """Whether this process may write: not after `release`, and not in a child that was forked since."""
        return not self._released and self._pid == os.getpid()

    def release(self) -> None:
        """Give it up. A second call does nothing."""
        with self._guard:
            if not self.is_held:
                return
            self._released = True
            pid, descriptor, count = self._held.pop(self._path)
            if count > 1:
                self._held[self._path] = (pid, descriptor, count - 1)
            else:
                os.close(descriptor)


def _lock(path: Path) -> int:
    """Open the lock file, lock it, and write into it who does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(
            f"{path.parent} can not be written: {error.strerror}.",
            fix="Name a directory that can, or open the store with read_only=True.",
        ) from None
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise _refusal(path, error, holder) from None
    with contextlib.suppress(OSError):  # a full disk: who holds the lock is a courtesy
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return descriptor


def _refusal(path: Path, error: OSError, holder: dict[str, Any]) -> ZooError:
    if error.errno in (errno.EACCES, errno.EAGAIN):
        return StoreLockedError(
            f"{path.parent} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}.",
            fix="Wait for it or stop it; to load meanwhile, open the store with read_only=True.",
        )
    return InputError(
        f"{path.parent} is on a file system without locks: {error.strerror}.",
        fix="If no other process writes this store, open it with lock=False.",
    )


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 1000, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
