"""Batches: token ids, what follows each, and where documents begin.

Shape letters: B rows, T positions. A sequence of n tokens takes n - 1 positions: its last token is only a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.models.masks import CAUSAL, Mask
from zoo.text.samples import Encoded

IGNORED = -100
"""The target of a position that is not learnt, as `torch.nn.functional.cross_entropy` has it."""
Row = Sequence[Encoded]
"""Sequences that share a row, one after the other."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model computes at a time.

    Attributes:
        tokens_BT: int64 ids, right-padded: no token sees what comes after it, so padding needs no mask.
        targets_BT: int64, the id that follows each position, `IGNORED` where it is not learnt.
        positions_BT: int64, counted anew in each document; ``None``: they count up from 0.
        documents_BT: int64, the document of each position, if rows hold several; padding is one of its own.
        n_tokens: positions that are not padding.
        n_supervised: targets that are learnt.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None
    documents_BT: Tensor | None
    n_tokens: int
    n_supervised: int

    @property
    def mask(self) -> Mask:
        """What each position may see."""
        return CAUSAL if self.documents_BT is None else Mask(documents_BS=self.documents_BT)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=non_blocking),
            targets_BT=self.targets_BT.to(device, non_blocking=non_blocking),
            positions_BT=moved(self.positions_BT),
            documents_BT=moved(self.documents_BT),
        )

    def silenced(self) -> Batch:
        """The same computation with nothing to learn, for a rank that has no sample in a step."""
        return replace(self, targets_BT=torch.full_like(self.targets_BT, IGNORED), n_supervised=0)


def collate(rows: Sequence[Row], *, packed: bool) -> Batch:
    """One batch of rows, as wide as the longest.

    Args:
        rows: at least one; each holds one sequence, or several if ``packed``.
    """
    width = max(row_length(row) for row in rows)
    shape = (len(rows), width)
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    positions, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    n_tokens = 0
    for r, row in enumerate(rows):
        start = 0
        for d, encoded in enumerate(row):
            end = start + len(encoded) - 1
            tokens[r, start:end] = encoded.ids[:-1]
            # The target of the last position is the document's own last token, never the next one's first.
            targets[r, start:end] = np.where(encoded.supervised[1:], encoded.ids[1:], IGNORED)
            positions[r, start:end] = np.arange(end - start)
            documents[r, start:end] = d
            start = end
        documents[r, start:] = len(row)
        n_tokens += start
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        positions_BT=torch.from_numpy(positions) if packed else None,
        documents_BT=torch.from_numpy(documents) if packed else None,
        n_tokens=n_tokens,
        n_supervised=int((targets != IGNORED).sum()),
    )


def row_length(row: Row) -> int:
    """Positions that a row takes."""
    return sum(len(encoded) - 1 for encoded in row)


def deal(rows: Sequence[Row], *, rank: int, world_size: int, micro_batch_size: int, packed: bool) -> list[Batch]:
    """One rank's micro-batches of the rows of one optimizer step.

    The rows are sorted by length, the longest first, and cut into equally many groups for each rank, whose sizes differ
    by one at most: all ranks compute rows of about the same length at the same time. A rank that gets no row in a round
    gets one with nothing to learn, since all must take part.
    """
    assert 0 <= rank < world_size and micro_batch_size >= 1
    ordered = sorted(rows, key=row_length, reverse=True)
    n_rounds = -(-len(ordered) // (world_size * micro_batch_size))
    groups = np.array_split(np.arange(len(ordered)), n_rounds * world_size)
    batches = []
    for number in range(rank, len(groups), world_size):
        group = [ordered[int(i)] for i in groups[number]]
        batches.append(collate(group, packed=packed) if group else collate(ordered[-1:], packed=packed).silenced())
    return batches


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Put items into rows of a capacity: the longest first, each into the row that it fills best.

    Best-fit decreasing: a pure function of the lengths.

    Args:
        lengths: of the items, each at most ``capacity``.

    Returns:
        The numbers of the items of each row.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # A tree over rooms: each node says whether a row below it has one.
    size = 1 << capacity.bit_length()
    some = np.zeros(2 * size, dtype=np.int64)

    def count(room: int, change: int) -> None:
        node = room + size
        while node:
            some[node] += change
            node >>= 1

    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        room = _first_at_least(some, size, length)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = by_room[room].pop()
            count(room, -1)
        rows[row].append(item)
        by_room[room - length].append(row)
        count(room - length, 1)
    return rows


def _first_at_least(some: NDArray[np.int64], size: int, least: int) -> int | None:
    """The smallest room of at least ``least`` that a row has."""
    node = least + size
    if some[node]:
        return least
    while node > 1:  # up to where a branch to the right has one, then down to its leftmost
        if node % 2 == 0 and some[node + 1]:
            node += 1
            while node < size:
                node = 2 * node if some[2 * node] else 2 * node + 1
            return node - size
        node //= 2
    return None
