"""A batch without what does not have to be computed: padding, tokens after the last target, and repeated beginnings.

The templates of instructions begin alike, and so do samples that share a system prompt or a question. A causal model
makes the same of the same beginning, so it is computed once; gradients are those of the whole batch, up to rounding.

Shape letters: B rows, T positions, S tokens that are left, M supervised targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.batches import IGNORED, Batch
from zoo.models.rows import RowGroup, Rows

Ints = NDArray[np.int64]

_ROUND = 16
"""All sizes are multiples of it: a product of new sizes costs a CPU 0.7 ms and half a megabyte, once."""


@dataclass(frozen=True, eq=False)
class Condensed:
    """What a model computes of a batch.

    Attributes:
        tokens_1S: int64 ids.
        positions_1S: int64, of each within its sequence.
        rows: the sequences that they form.
        supervised_M: which of the S tokens each target follows; one may be followed by several.
        targets_M: int64 ids, or `IGNORED`.
        n_supervised: targets that are learnt.
    """

    tokens_1S: Tensor
    positions_1S: Tensor
    rows: Rows
    supervised_M: Tensor
    targets_M: Tensor
    n_supervised: int

    def to(self, device: torch.device | str) -> Condensed:
        """The same on a device."""
        groups = tuple(RowGroup(group.index_RL.to(device), group.n_known) for group in self.rows.groups)
        return Condensed(
            tokens_1S=self.tokens_1S.to(device),
            positions_1S=self.positions_1S.to(device),
            rows=Rows(groups, self.rows.places_S.to(device)),
            supervised_M=self.supervised_M.to(device),
            targets_M=self.targets_M.to(device),
            n_supervised=self.n_supervised,
        )


@dataclass(eq=False)
class _Sequence:
    tokens: Ints
    positions: Ints
    targets: Ints
    index: Ints
    """Which of the tokens that are left each one is."""
    n_known: int = 0
    """So many at the beginning belong to an earlier sequence."""

    def number(self, n_tokens: int, before: _Sequence | None) -> int:
        """Give each token its number, after ``n_tokens`` of earlier sequences; returns how many there are then."""
        if before is not None:
            self.n_known = self._n_common(before)
            self.index[: self.n_known] = before.index[: self.n_known]
        n_new = len(self.index) - self.n_known
        self.index[self.n_known :] = np.arange(n_tokens, n_tokens + n_new)
        return n_tokens + n_new

    def _n_common(self, other: _Sequence) -> int:
        """How many tokens at the beginning are the same, at the same positions."""
        n = min(len(self.tokens), len(other.tokens))
        differs = (self.tokens[:n] != other.tokens[:n]) | (self.positions[:n] != other.positions[:n])
        return int(differs.argmax()) if differs.any() else n


def condense(batch: Batch, *, share: bool = True) -> Condensed:
    """The tokens of a batch that its loss depends on.

    Args:
        batch: best on the CPU; a sequence is a document of a row, or a row.
        share: compute common beginnings once. Not with dropout, which is to differ from sequence to sequence.
    """
    sequences = list(_sequences(batch))
    # Sorted, each sequence shares with the one before it as much as with any that came earlier.
    sequences.sort(key=lambda sequence: sequence.tokens.tobytes())
    n_tokens = 0
    before = None
    for sequence in sequences:
        n_tokens = sequence.number(n_tokens, before if share else None)
        before = sequence
    tokens = np.concatenate([sequence.tokens[sequence.n_known :] for sequence in sequences])
    positions = np.concatenate([sequence.positions[sequence.n_known :] for sequence in sequences])
    targets = np.concatenate([sequence.targets for sequence in sequences])
    supervised = np.concatenate([sequence.index for sequence in sequences])[targets != IGNORED]
    return Condensed(
        tokens_1S=_rounded(tokens)[None],
        positions_1S=_rounded(positions)[None],
        rows=_rows(sequences, n_tokens),
        supervised_M=_rounded(supervised),
        targets_M=_rounded(targets[targets != IGNORED], IGNORED),
        n_supervised=len(supervised),
    ).to(batch.tokens_BT.device)


def _rounded(values: Ints, fill: int = 0) -> Tensor:
    """With ``fill`` at the end, up to a multiple of `_ROUND`."""
    return torch.from_numpy(np.pad(values, (0, -len(values) % _ROUND), constant_values=fill))


def _sequences(batch: Batch) -> Iterator[_Sequence]:
    """What each document has up to its last target; of a batch without any target, its first token."""
    tokens, targets = batch.tokens_BT.cpu().numpy(), batch.targets_BT.cpu().numpy()
    width = tokens.shape[1]
    counted = np.broadcast_to(np.arange(width), tokens.shape)
    positions = counted if batch.positions_BT is None else batch.positions_BT.cpu().numpy()
    documents = np.zeros_like(tokens) if batch.documents_BT is None else batch.documents_BT.cpu().numpy()
    found = False
    for r in range(len(tokens)):
        starts = [0, *(np.flatnonzero(np.diff(documents[r])) + 1).tolist(), width]
        for start, end in pairwise(starts):
            learnt = np.flatnonzero(targets[r, start:end] != IGNORED)
            if len(learnt):
                found = True
                yield _part(tokens[r], positions[r], targets[r], slice(start, start + int(learnt[-1]) + 1))
    if not found:
        yield _part(tokens[0], positions[0], targets[0], slice(0, 1))


def _part(tokens: Ints, positions: Ints, targets: Ints, part: slice) -> _Sequence:
    return _Sequence(tokens[part], positions[part], targets[part], np.empty(part.stop - part.start, np.int64))


@dataclass(eq=False)
class _Group:
    """Sequences of which none asks for more than twice as many tokens as another, or as are its own."""

    members: list[_Sequence]
    n_known: int
    fewest: int
    most: int

    def take(self, one: _Sequence) -> bool:
        """Take a sequence in, if it fits; those that know less have come before."""
        n_asked = len(one.index) - self.n_known
        fewest, most = min(self.fewest, n_asked), max(self.most, n_asked)
        if 2 * fewest < most or 2 * (one.n_known - self.n_known) > n_asked:
            return False
        self.members.append(one)
        self.fewest, self.most = fewest, most
        return True


def _groups(sequences: Sequence[_Sequence]) -> list[_Group]:
    groups: list[_Group] = []
    asking = [one for one in sequences if one.n_known < len(one.index)]
    for one in sorted(asking, key=lambda one: one.n_known):
        if not any(group.take(one) for group in groups):
            n_asked = len(one.index) - one.n_known
            groups.append(_Group([one], one.n_known, n_asked, n_asked))
    return groups


def _rows(sequences: Sequence[_Sequence], n_tokens: int) -> Rows:
    made: list[RowGroup] = []
    places = np.empty(n_tokens, np.int64)
    offset = 0
    for group in _groups(sequences):
        n_asked = group.most + -group.most % _ROUND
        index = np.zeros((len(group.members), group.n_known + n_asked), np.int64)
        for r, one in enumerate(group.members):
            index[r, : len(one.index)] = one.index
            asked = one.index[group.n_known :]
            places[asked] = offset + r * n_asked + np.arange(len(asked))
        made.append(RowGroup(torch.from_numpy(index), group.n_known))
        offset += len(group.members) * n_asked
    return Rows(tuple(made), _rounded(places))
