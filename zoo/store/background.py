"""A save that goes on in a thread while the training does."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from zoo.errors import ZooError
from zoo.store.fence import Fence
from zoo.store.ranks import PATIENCE_S, Exchange, Procedure, Ranks

T = TypeVar("T")


class BackgroundWork(Generic[T]):
    """Runs a procedure of all ranks, whose local parts take time, beside the training.

    The thread never talks to other ranks: their exchanges must come in the same order on all of them, which only their
    main threads can promise. So the thread stops at each exchange, and `poll`, which all ranks call, holds it when all
    have arrived. A process that trains alone has nobody to wait for, and runs through.

    The thread is no daemon: a process that ends without `wait` still finishes what it was writing.
    """

    def __init__(self, procedure: Procedure[T], ranks: Ranks) -> None:
        self._procedure, self._ranks = procedure, ranks
        self._exchange: Exchange | None = None
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._run(None)

    def poll(self) -> list[T]:
        """The result, in a list that is empty until there is one. Takes no longer than an exchange of the ranks.

        Raises:
            ZooError: the work failed; on all ranks alike.
        """
        if self._ranks.world_size == 1:
            return [] if self._thread.is_alive() else self._ended()
        is_here = not self._thread.is_alive()
        at = self._exchange.kind if self._exchange else "the end"
        mine = {"at": at if is_here else None, "error": str(self._error) if is_here and self._error else None}
        reports = self._ranks.gather("save: progress", mine, timeout=PATIENCE_S)
        if not all(report["at"] for report in reports):
            return []
        failed = {rank: report["error"] for rank, report in enumerate(reports) if report["error"]}
        if failed:
            said = "; ".join(f"rank {rank}: {error}" for rank, error in failed.items())
            raise self._error or ZooError(f"saving in the background failed. {said}")
        if self._exchange is None:
            return self._ended()
        self._run(self._exchange.gather(self._ranks))
        return []

    def wait(self) -> T:
        """The result. Raises as `poll`."""
        while True:
            self._thread.join()
            if result := self.poll():
                return result[0]

    def _ended(self) -> list[T]:
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, payloads: list[object] | None) -> None:
        self._exchange = None
        self._thread = threading.Thread(target=self._advance, args=(payloads,), name="save")
        self._thread.start()

    def _advance(self, payloads: list[object] | None) -> None:
        """Go on to the next exchange, or to the end."""
        alone = Fence() if self._ranks.world_size == 1 else None
        try:
            exchange = self._procedure.send(payloads) if payloads is not None else next(self._procedure)
            while alone is not None:
                exchange = self._procedure.send(exchange.gather(alone))
            self._exchange = exchange
        except StopIteration as end:
            self._result = [end.value]
        except BaseException as error:  # noqa: BLE001 - it is raised by poll, in the thread that can act on it
            self._error = error
