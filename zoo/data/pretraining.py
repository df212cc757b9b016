"""Random windows of a token file, each a function of the seed and the step.

Shape letters: B windows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.data.batches import IGNORED, Batch
from zoo.data.token_file import TokenFile
from zoo.errors import InputError


class PretrainingData:
    """Windows of ``block_size`` tokens as optimizer steps.

    Args:
        train: the corpus.
        validation: held out, if there is any.
        batch_size: windows of an optimizer step, on all ranks together.
        block_size: positions of a window.
        seed: of the places where windows begin. The step's number is all that is needed to go on.
        isolate_documents: keep the documents of a window apart: a document mask, positions that begin anew, and no
            target across an EOS. Otherwise a window is one text, as in nanoGPT.

    Raises:
        InputError: a corpus is shorter than a window, a number is out of range, or the documents can not be told apart.
    """

    def __init__(
        self,
        train: TokenFile,
        validation: TokenFile | None = None,
        *,
        batch_size: int,
        block_size: int,
        seed: int = 0,
        isolate_documents: bool = False,
    ) -> None:
        if batch_size < 1 or block_size < 1 or seed < 0:
            raise InputError(
                "batch_size and block_size must be at least 1, and seed at least 0; they are "
                f"{batch_size}, {block_size} and {seed}."
            )
        if len(train) <= block_size:
            raise InputError(
                f"{train.path} has {len(train)} tokens, too few for one window of {block_size} and the token after it.",
                fix=f"Take windows of at most {len(train) - 1}: --max-seq-len {len(train) - 1}.",
            )
        self._eos = train.facts.eos_id if isolate_documents else None
        if isolate_documents and self._eos is None:
            raise InputError(f"{train.path} has no EOS between documents, so they can not be kept apart.")
        self._train, self._validation = train, validation
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed

    @property
    def steps_per_epoch(self) -> int:
        """Steps that draw as many tokens as the corpus has."""
        return max(1, len(self._train) // (self.batch_size * self.block_size))

    def step(self, number: int, *, rank: int = 0, world_size: int = 1, micro_batch_size: int = 1) -> list[Batch]:
        """One rank's micro-batches of a step: equally many on each rank.

        Args:
            number: how many steps were made before it.
        """
        starts = self.starts(number)
        n_rounds = -(-len(starts) // (world_size * micro_batch_size))
        groups = np.array_split(starts, n_rounds * world_size)
        return [self._batch(self._train, groups[i], starts) for i in range(rank, len(groups), world_size)]

    def starts(self, number: int) -> NDArray[np.int64]:
        """Where the windows of a step begin."""
        generator = np.random.default_rng([self.seed, number])
        return generator.integers(0, len(self._train) - self.block_size, size=self.batch_size)

    def n_supervised(self, number: int) -> int:
        """Targets of a step, on all ranks together."""
        if self._eos is None:
            return self.batch_size * self.block_size
        return sum(batch.n_supervised for batch in self.step(number, micro_batch_size=self.batch_size))

    def validation(
        self, *, rank: int = 0, world_size: int = 1, micro_batch_size: int = 1, limit: int | None = None
    ) -> Iterator[Batch]:
        """One rank's share of the validation set, in windows that follow one another: each target occurs once.

        Args:
            limit: only so many windows, from the start.
        """
        if self._validation is None or len(self._validation) < 2:
            return
        starts = np.arange(0, len(self._validation) - 1, self.block_size)[:limit]
        step = world_size * micro_batch_size
        for first in range(0, len(starts), step):
            share = starts[first + rank * micro_batch_size : first + (rank + 1) * micro_batch_size][: len(starts)]
            yield self._batch(self._validation, share, starts)

    def _batch(self, tokens: TokenFile, starts: NDArray[np.int64], others: NDArray[np.int64]) -> Batch:
        """The windows that begin at ``starts``; without any, one of the others with nothing to learn."""
        if not len(starts):
            return self._batch(tokens, others[:1], others).silenced()
        windows = [np.asarray(tokens.ids[start : start + self.block_size + 1]) for start in starts.tolist()]
        width = max(map(len, windows)) - 1
        inputs, targets = np.zeros((len(windows), width), np.int64), np.full((len(windows), width), IGNORED, np.int64)
        for row, window in enumerate(windows):
            inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
        positions = documents = None
        if self._eos is not None:
            targets[inputs == self._eos] = IGNORED  # the next document does not follow from this one
            positions, documents = _documents(inputs, self._eos)
        return Batch(
            tokens_BT=torch.from_numpy(inputs),
            targets_BT=torch.from_numpy(targets),
            positions_BT=None if positions is None else torch.from_numpy(positions),
            documents_BT=None if documents is None else torch.from_numpy(documents),
            n_tokens=sum(len(window) - 1 for window in windows),
            n_supervised=int((targets != IGNORED).sum()),
        )


def _documents(inputs_BT: NDArray[np.int64], eos: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The position of each token in its document, and the number of the document."""
    begins = np.zeros(inputs_BT.shape, dtype=bool)
    begins[:, 1:] = inputs_BT[:, :-1] == eos
    places = np.arange(inputs_BT.shape[1])[None]
    starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return places - starts, begins.cumsum(axis=1)
