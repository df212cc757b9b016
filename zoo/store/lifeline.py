"""One connection per rank to rank 0, and a thread that listens to it: who has ended, failed or died, and where one is.

The kernel closes the connections of a process that is killed, and probes those to a machine that is silent. So a death
is known at once, and a process that computes, holds Python's lock or is stopped is never taken for dead, as it would be
by heartbeats that its Python has to send. The thread also ends a process whose main thread can not raise any more:
nothing interrupts a collective that waits for a rank which will not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from zoo.errors import ZooError
from zoo.store.positions import Json, names

_TICK = 0.25
"""Seconds between two looks at the clock."""
_SEND = 5.0
"""Seconds that a message may take; a rank that reads none for so long has more to worry about."""
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 40_000}
"""A machine that does not answer is lost after 40 seconds."""


class FenceError(ZooError):
    """A rank was lost, or the ranks disagree. It is raised on all ranks, and names each one's position."""

    exit_code = 70


class Stack(NamedTuple):
    """Where the main thread of a rank is: in one line, and in full."""

    line: str
    text: str


class Lifeline:
    """The connections of one rank, and what it has heard from the others.

    Every public method is called from the main thread: the one that made the lifeline. ``failure`` and ``ended`` may be
    read at any time. Messages between two ranks other than 0 pass through rank 0.
    """

    def __init__(self, rank: int, world_size: int, sockets: dict[int, socket.socket], *, grace: float) -> None:
        self.failure: FenceError | None = None
        self.ended: dict[int, str] = {}
        self.give_up_at: float | None = None
        self._rank, self._others, self._grace = rank, frozenset(range(world_size)) - {rank}, grace
        self._sockets, self._unread = dict(sockets), dict.fromkeys(sockets, b"")
        self._gone: set[int] = set()
        self._acknowledged: set[int] = set()
        self._stacks: dict[int, Stack | None] = {}
        self._heard_at: float | None = None
        self._is_leaving = self._is_closed = False
        self._main = threading.get_ident()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for peer, connection in sockets.items():
            _keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, peer)
        _OPEN.add(self)
        threading.Thread(target=self._listen, name="zoo-lifeline", daemon=True).start()

    def fail(self, failure: FenceError) -> None:
        """Tell all ranks, unless a failure is known already, and wait until they have heard it."""
        with self._changed:
            self.failure = self.failure or failure
        self._send("failed", [failure.message, failure.fix])
        self.leave()

    def leave(self) -> None:
        """The main thread is about to raise: wait until every rank has said why, but no longer than watchdogs need.

        A process that ended before would close the connections of its collectives, and the others report only that.
        """
        if self._is_leaving:
            return
        self._is_leaving = True
        self._send("acknowledged")
        self._wait(lambda: self._others <= self._acknowledged | self._gone | set(self.ended), self._grace + 2)

    def end(self, how: str, *, patience: float) -> None:
        """Say that this rank ends in good order; rank 0, which hosts the store, waits for the others to end too."""
        self._is_leaving = True
        self._send("ended", how)
        if self._rank == 0 and self.failure is None:
            self._wait(lambda: self._others <= self._gone | set(self.ended), patience)

    def stacks(self, ranks: Iterable[int], *, patience: float = 1.0) -> dict[int, Stack | None]:
        """Where the main threads of these ranks are; ``None`` for a rank that does not answer."""
        asked = sorted(ranks)
        with self._changed:
            self._stacks = dict.fromkeys(asked)
        for rank in asked:
            self._send("asks", to=rank)
        self._wait(lambda: all(self._stacks.values()), patience)
        return self._stacks

    def hears_failure(self, *, patience: float) -> bool:
        """Whether a failure is known; one that has just happened may take a moment to arrive."""
        self._wait(lambda: self.failure is not None, patience)
        return self.failure is not None

    def close(self) -> None:
        """End the connections and the thread, which closes what it listens to."""
        self._is_closed = True
        for connection in list(self._sockets.values()):
            with contextlib.suppress(OSError):  # the other side may be faster
                connection.shutdown(socket.SHUT_RDWR)

    def drop_connections(self) -> None:
        """Close this process's ends, as a forked child must: it would hold up the news of its parent's death."""
        for connection in list(self._sockets.values()):
            connection.close()

    def _wait(self, is_done: Callable[[], bool], patience: float) -> None:
        with self._changed:
            self._changed.wait_for(is_done, patience)

    def _send(self, what: str, value: Json = None, *, to: int | None = None, sender: int | None = None) -> None:
        """To one rank or all; rank 0 passes on what others say, which is then sent to all but the sender."""
        sender = self._rank if sender is None else sender
        line = json.dumps([sender, to, what, value]).encode() + b"\n"
        with self._sending:
            for peer, connection in list(self._sockets.items()):
                if peer != sender and (to in (None, peer) or self._rank):
                    with contextlib.suppress(OSError):  # whoever is gone is noticed by the thread, which reads
                        connection.sendall(line)

    def _listen(self) -> None:
        while not self._is_closed:
            for key, _ in self._selector.select(_TICK):
                self._read(key.data)
            self._watch()
        self._selector.close()
        self.drop_connections()

    def _read(self, peer: int) -> None:
        try:
            received = self._sockets[peer].recv(65536)
        except TimeoutError:
            return
        except OSError:
            received = b""
        if not received:
            self._lose(peer)
            return
        *lines, self._unread[peer] = (self._unread[peer] + received).split(b"\n")
        for line in lines:
            sender, to, what, value = json.loads(line)
            if self._rank == 0 and to != 0:
                self._send(what, value, to=to, sender=sender)
            if to is None or to == self._rank:
                self._hear(sender, what, value)

    def _hear(self, sender: int, what: str, value: Json) -> None:
        with self._changed:
            if what == "failed" and self.failure is None:
                self.failure, self._heard_at = FenceError(value[0], fix=value[1]), time.monotonic()
            elif what == "acknowledged":
                self._acknowledged.add(sender)
            elif what == "ended":
                self.ended[sender] = value
            elif what == "gone":
                self._gone.update(value)
            elif what == "stack":
                self._stacks[sender] = Stack(*value)
            self._changed.notify_all()
        if what == "asks":
            self._send("stack", list(self._own_stack()), to=sender)

    def _lose(self, peer: int) -> None:
        """The connection is closed: in good order, after a failure, or because the process is dead."""
        self._selector.unregister(self._sockets[peer])
        self._sockets.pop(peer).close()
        if self._is_closed:
            return
        self._hear(self._rank, "gone", sorted(self._others) if peer == 0 else [peer])  # without 0, no news of others
        if self._rank == 0:
            self._send("gone", [peer])
        if peer in self.ended or self.failure:
            return
        what = "rank 0 is gone, and with it the store that it hosted" if peer == 0 else f"rank {peer} is gone"
        failure = [
            f"{what}: its connection closed without a word.",
            "It was killed (by a signal, or for want of memory) or its machine is lost: see the end of its own log.",
        ]
        if self._rank == 0:
            self._send("failed", failure)
        self._hear(self._rank, "failed", failure)

    def _watch(self) -> None:
        """End the process when its main thread has not come back from a collective or a store that is silent."""
        now = time.monotonic()
        if self._is_leaving or self._is_closed:
            return
        if self._heard_at is not None and now > self._heard_at + self._grace:
            self._end_process(str(self.failure))
        elif self.give_up_at is not None and now > self.give_up_at:
            self._end_process("rank 0, which hosts the store, does not answer: it is stopped, or its machine is.")

    def _end_process(self, why: str) -> None:
        last_words(
            f"zoo: rank {self._rank}: {why}\n"
            f"The main thread of rank {self._rank} can not be interrupted, and the process ends with exit code "
            f"{FenceError.exit_code}. It is at:\n{self._own_stack().text}"
        )
        self._send("acknowledged")
        self._acknowledged.add(self._rank)
        until = time.monotonic() + 1  # the others print their reasons before they see our connections close
        while time.monotonic() < until and not self._others <= self._acknowledged | self._gone | set(self.ended):
            for key, _ in self._selector.select(0.1):
                self._read(key.data)
        os._exit(FenceError.exit_code)

    def _own_stack(self) -> Stack:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return Stack("nowhere, its main thread has ended", "  (its main thread has ended)\n")
        entries = traceback.extract_stack(frame)
        inner = entries[-1]
        outer = next((entry for entry in reversed(entries) if not entry.filename.startswith(_INSTALLED)), inner)
        line = f"{inner.name} ({inner.filename}:{inner.lineno})"
        if outer is not inner:
            line += f", called from {outer.name} ({outer.filename}:{outer.lineno})"
        return Stack(line, "".join(entries.format()))


def last_words(text: str) -> None:
    """Print where a thread that may hold the stream's lock can not stop us: for a process about to be ended."""

    def say() -> None:
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()
        sys.stdout.flush()

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    speaker.join(timeout=1)


def describe_stacks(stacks: dict[int, Stack | None], *, shown: int = 3) -> str:
    """The stacks of a few ranks, for the log of one that waits for them."""
    parts = []
    for rank, stack in list(stacks.items())[:shown]:
        if stack is None:
            parts.append(f"Rank {rank} is connected and does not answer: it holds Python's lock, or is stopped.\n")
        else:
            parts.append(f"The main thread of rank {rank} is at:\n{stack.text}")
    if len(stacks) > shown:
        parts.append(f"Also waiting for {names(list(stacks)[shown:])}.\n")
    return "".join(parts)


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(_SEND)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _forget_in_child() -> None:
    for lifeline in _OPEN:
        lifeline.drop_connections()


_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OPEN: weakref.WeakSet[Lifeline] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
