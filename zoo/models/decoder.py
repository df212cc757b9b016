"""What generation asks of a model, and how a module that is no `GPT` answers.

Shape letters: B batch, T new tokens, S tokens in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.models.gpt import GPT
from zoo.models.masks import CAUSAL, Mask
from zoo.spec import ModelSpec


class SequenceCache(Protocol):
    """What is kept of tokens that have run: `zoo.models.cache.KVCache`, or the tokens themselves."""

    length: int
    """Tokens held per row."""

    def continues(self, n_tokens: int) -> bool:
        """Whether ``n_tokens`` can follow what is held."""

    def reserve(self, capacity: int) -> None:
        """Make room for at least ``capacity`` tokens per row."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one that is named twice becomes two."""

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""


class Decoder(Protocol):
    """A model to generate with; `zoo.models.gpt.GPT` says what each argument means."""

    @property
    def spec(self) -> ModelSpec:
        """Its architecture."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def new_cache(self, capacity: int, batch: int = 1) -> SequenceCache:
        """An empty cache for so many tokens per row."""

    def __call__(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        mask: Mask = CAUSAL,
        cache: Any = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or (B, 1, V)."""


def decoder_of(model: nn.Module, spec: ModelSpec) -> Decoder:
    """The model itself, or what makes a decoder of it."""
    return model if isinstance(model, GPT) else WholeSequence(model, spec)


class WholeSequence:
    """A decoder around any module that maps tokens (B, S) to logits (B, S, V): each time, all tokens run anew.

    The module may also return a tuple that begins with the logits, or an object that has them as ``logits``.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        self.module, self.spec = module, spec

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(chain(self.module.parameters(), self.module.buffers())).device

    def new_cache(self, capacity: int, batch: int = 1) -> TokenCache:
        """Of token ids."""
        return TokenCache(capacity, batch, self.device)

    def __call__(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        mask: Mask = CAUSAL,
        cache: TokenCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the new tokens; padded rows run one by one, since the module knows no padding.

        Raises:
            ZooError: the module has computed logits of other positions than it was given.
        """
        assert mask.features <= {"causal", "padding"}, "a module of its own has a mask of its own"
        tokens_BS = tokens_BT if cache is None else cache.append(tokens_BT)
        n_wanted = 1 if last_only else tokens_BT.shape[1]
        if mask.padding_B is None:
            return self._logits(tokens_BS, n_wanted)
        assert last_only, "the logits of padding are of no use"
        rows = zip(tokens_BS, mask.padding_B.tolist(), strict=True)
        return torch.cat([self._logits(tokens_S[None, n_padding:], n_wanted) for tokens_S, n_padding in rows])

    def _logits(self, tokens_BS: Tensor, n_wanted: int) -> Tensor:
        result = self.module(tokens_BS)
        logits: Tensor = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
        if logits.shape[1] not in (tokens_BS.shape[1], n_wanted):  # nanoGPT's, of the last position alone, will do
            raise ZooError(
                f"{type(self.module).__name__} has logits of {logits.shape[1]} positions for {tokens_BS.shape[1]} "
                f"tokens, and those of {n_wanted} are wanted."
            )
        return logits[:, -n_wanted:]


class TokenCache:
    """The token ids of each row, for a module that has no cache."""

    def __init__(self, capacity: int, batch: int, device: torch.device) -> None:
        self.length = 0
        self._ids = torch.zeros(batch, capacity, dtype=torch.long, device=device)

    def append(self, tokens_BT: Tensor) -> Tensor:
        """Keep new tokens; returns all (B, S)."""
        end = self.length + tokens_BT.shape[1]
        self._ids[:, self.length : end] = tokens_BT
        self.length = end
        return self._ids[:, :end]

    def continues(self, n_tokens: int) -> bool:
        """Always."""
        return True

    def reserve(self, capacity: int) -> None:
        """As `SequenceCache.reserve`."""
        missing = capacity - self._ids.shape[1]
        if missing > 0:
            self._ids = torch.cat((self._ids, self._ids.new_zeros(self._ids.shape[0], missing)), dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """As `SequenceCache.select`."""
        self._ids = self._ids[list(rows)]

    def truncate(self, length: int) -> None:
        """As `SequenceCache.truncate`."""
        assert 0 <= length <= self.length
        self.length = length
