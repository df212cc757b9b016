"""Signals that ask a job to save and stop. The first is only noted, for the next step's post; a second acts at once."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from types import FrameType, TracebackType
from typing import Any

from zoo.errors import InputError
from zoo.store.lifeline import last_words

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
_SAME = 1.0
"""Seconds in which further signals repeat the first: torchrun passes on what a cluster has sent to every process."""
_PATIENCE = 1.0
"""Seconds in which the main thread may act on a second signal; in a collective that never ends it can not."""


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGUSR1 between `install` and `restore`, or inside ``with``.

    ``received`` is the name of the first that came. A second one, more than a second later, ends the process, or raises
    ``KeyboardInterrupt`` if it is SIGINT. Python runs handlers in the main thread alone, so a thread of ours sees to it
    that a second signal ends a process whose main thread is stuck.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._first_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._wakeup = -1
        self._pipe: tuple[int, int] | None = None
        self._is_restored = threading.Event()

    def install(self) -> StopSignals:
        """Take the signals over.

        Raises:
            InputError: this is not the main thread, where Python allows it.
        """
        if threading.current_thread() is not threading.main_thread():
            raise InputError("signals can be caught from the main thread only.", fix="Start the training there.")
        self._is_restored.clear()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for name in _NAMES:
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self._previous[number] = signal.signal(number, self._note)
        _INSTALLED.add(self)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="zoo-signals", daemon=True).start()
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        if self._pipe is None:
            return
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        signal.set_wakeup_fd(self._wakeup)
        self._is_restored.set()
        os.close(self._pipe[1])  # the thread reads the end of the pipe, and closes its side
        self._pipe = None
        self._previous.clear()
        _INSTALLED.discard(self)

    def __enter__(self) -> StopSignals:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if not self._is_second():
            return
        self.restore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _is_second(self) -> bool:
        """Whether a signal that has just come is another request than the first; asked by both threads."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
        return now > self._first_at + _SAME

    def _watch(self, pipe: int) -> None:
        count = 0
        while arrived := os.read(pipe, 64):
            ours = [number for number in arrived if number in self._previous]
            count += len(ours)
            if ours and self._is_second() and count >= 2 and not self._is_restored.wait(_PATIENCE):
                name = signal.Signals(ours[-1]).name
                last_words(f"zoo: stopped by a second signal, {name}, in a call that can not be interrupted.")
                os._exit(128 + ours[-1])
        os.close(pipe)

    def _forget_in_child(self) -> None:
        """A forked child (of a data loader) leaves stopping to its parent, and can be terminated by it."""
        signal.set_wakeup_fd(-1)
        for end in self._pipe or ():
            os.close(end)
        self._pipe = None
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _in_child() -> None:
    for signals in list(_INSTALLED):
        signals._forget_in_child()


_INSTALLED: weakref.WeakSet[StopSignals] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
