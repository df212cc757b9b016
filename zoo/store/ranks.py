"""What the store asks of the processes that train together: who they are, and one meeting at a time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

PATIENCE_S = 3600.0
"""How long ranks wait for one that writes or reads: disks are slow. One that dies is noticed at once."""


class Ranks(Protocol):
    """The ranks of one training, which meet to exchange JSON: `zoo.store.fence.Fence`, or what behaves like it."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    def gather(
        self, kind: str, payload: Any = None, *, fingerprint: Any = None, timeout: float | None = None
    ) -> list[Any]:
        """Meet all ranks; a meeting that can not come about must raise, not hang.

        Args:
            kind: the name of the meeting; all ranks must give the same.
            payload: this rank's contribution, JSON.
            fingerprint: what must be equal on all ranks, such as the step that is saved; JSON.
            timeout: seconds to wait for the others.

        Returns:
            All payloads, by rank.

        Raises:
            ZooError: the ranks called for different things, or one did not come.
        """
        ...


class Exchange(NamedTuple):
    """Where all ranks must arrive, to exchange their payloads. The arguments of `Ranks.gather`."""

    kind: str
    payload: Any = None
    fingerprint: Any = None
    timeout: float | None = None

    def gather(self, ranks: Ranks) -> list[Any]:
        """Meet."""
        return ranks.gather(self.kind, self.payload, fingerprint=self.fingerprint, timeout=self.timeout)


Procedure = Generator[Exchange, list[Any], T]
"""What all ranks do together: yields exchanges, is sent the payloads of all ranks, returns a result."""


def carry_out(procedure: Procedure[T], ranks: Ranks) -> T:
    """Run a procedure to its end, waiting at each exchange."""
    try:
        exchange = next(procedure)
        while True:
            exchange = procedure.send(exchange.gather(ranks))
    except StopIteration as end:
        return end.value
