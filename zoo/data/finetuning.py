"""Examples in an order that is a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.data.batches import Batch, Row, deal, pack, row_length
from zoo.errors import InputError
from zoo.text.samples import Encoded

WINDOW_STEPS = 32
"""Rows of so many steps, a quarter of the epoch at most, are sorted by length before they are cut into steps.

Padding is then little (with 8 rows a step and lognormal lengths, 3 % of the positions in place of 31 %), and each epoch
still has steps of its own.
"""


class FinetuningData:
    """Encoded samples as optimizer steps.

    Each epoch has every sample once, in an order of its own. The number of a step says which rows are in it, whatever
    the ranks and the size of micro-batches, and nothing else is needed to go on after an interruption. The last step of
    an epoch holds what is left over and may be smaller: with the loss divided by the number of supervised tokens of the
    step, each of them counts as much as any other.

    Args:
        train: what `zoo.data.encode.encode_samples` returned.
        validation: likewise; may be empty.
        batch_size: rows of an optimizer step, on all ranks together.
        seed: of the order.
        packing: put several samples into one row of ``max_seq_len`` positions; a document mask and positions that begin
            anew keep them apart. The rows are the same in each epoch, their order is not.
        max_seq_len: positions of a packed row; by default as many as the longest sample takes.

    Raises:
        InputError: there is nothing to train on, a number is out of range, or a sample is longer than a row.
    """

    def __init__(
        self,
        train: Sequence[Encoded],
        validation: Sequence[Encoded] = (),
        *,
        batch_size: int,
        seed: int = 0,
        packing: bool = False,
        max_seq_len: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        if seed < 0:
            raise InputError(f"seed must be at least 0, not {seed}.")
        if not any(encoded.n_supervised for encoded in train):
            raise InputError("there is nothing to train on: no sample has a token to learn.")
        self.batch_size, self.seed, self.packing = batch_size, seed, packing
        self.rows = _rows(train, packing, max_seq_len)
        self.validation_rows = _rows(validation, packing, max_seq_len)
        self._lengths = np.array([row_length(row) for row in self.rows])
        self._epoch: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every sample occurs once."""
        return -(-len(self.rows) // self.batch_size)

    def step(self, number: int, *, rank: int = 0, world_size: int = 1, micro_batch_size: int = 1) -> list[Batch]:
        """One rank's micro-batches of a step: equally many on each rank, the longest rows first.

        Args:
            number: how many steps were made before it.
        """
        rows = [self.rows[i] for i in self.rows_of(number)]
        return deal(rows, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, packed=self.packing)

    def n_supervised(self, number: int) -> int:
        """Tokens that are learnt in a step, on all ranks together: what its loss is divided by."""
        return sum(encoded.n_supervised for i in self.rows_of(number) for encoded in self.rows[i])

    def rows_of(self, number: int) -> list[int]:
        """The rows of a step, by their numbers in `rows`."""
        epoch, index = divmod(number, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._cut_into_steps(epoch))
        return self._epoch[1][index].tolist()

    def validation(self, *, rank: int = 0, world_size: int = 1, micro_batch_size: int = 1) -> list[Batch]:
        """One rank's share of the validation set: all samples once, sorted by length; empty if there are none."""
        if not self.validation_rows:
            return []
        return deal(
            self.validation_rows,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            packed=self.packing,
        )

    def _cut_into_steps(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each step of an epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self._lengths))
        n_whole = len(order) // self.batch_size
        whole, rest = order[: n_whole * self.batch_size], order[n_whole * self.batch_size :]
        window = max(1, min(WINDOW_STEPS, n_whole // 4)) * self.batch_size
        steps: list[NDArray[np.int64]] = []
        for start in range(0, len(whole), window):
            drawn = whole[start : start + window]
            by_length = drawn[np.argsort(self._lengths[drawn], kind="stable")]
            steps += np.split(by_length, len(by_length) // self.batch_size)
        shuffled = [steps[int(i)] for i in generator.permutation(len(steps))]
        return [*shuffled, rest] if len(rest) else shuffled


def _rows(sequences: Sequence[Encoded], packing: bool, max_seq_len: int | None) -> list[Row]:
    usable = [encoded for encoded in sequences if encoded.n_supervised]
    if not packing:
        return [(encoded,) for encoded in usable]
    lengths = np.array([len(encoded) - 1 for encoded in usable], dtype=np.int64)
    longest = int(lengths.max(initial=1))
    capacity = max_seq_len or longest
    if longest > capacity:
        raise InputError(f"a sample takes {longest} positions, and a row has {capacity}.", fix="Raise max_seq_len.")
    return [tuple(usable[i] for i in row) for row in pack(lengths, capacity)]
