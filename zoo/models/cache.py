"""The key/value cache: an argument of the forward pass, never a state of the model.

Shape letters: B batch, T new tokens, S tokens held, K kv heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zoo.models.rope import rotation_border
from zoo.spec import ModelSpec


class Cache(Protocol):
    """What a forward pass asks of a cache."""

    length: int
    """Tokens held."""

    def append(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all that the layer holds."""

    def advance(self, n_tokens: int) -> None:
        """Count ``n_tokens`` that every layer has stored."""

    def continues(self, n_tokens: int) -> bool:
        """Whether ``n_tokens`` can follow what is held."""


class KVCache:
    """Preallocated keys and values of every layer.

    Args:
        capacity: tokens per row it can hold.
    """

    def __init__(
        self, spec: ModelSpec, *, capacity: int, batch: int = 1, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (batch, capacity, spec.n_kv_heads, spec.d_head)
        self.capacity = capacity
        self.length = 0
        self._border = rotation_border(spec)
        self._beyond = False
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.n_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.n_layers)]

    @property
    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer at their full length, for decoding that writes into them itself."""
        return self._keys, self._values

    def append(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all that the layer holds, new ones included, as views."""
        end = self.length + k_BTKH.shape[1]
        assert end <= self.capacity, f"cache of {self.capacity} tokens can not hold {end}"
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.length : end] = k_BTKH
        values[:, self.length : end] = v_BTKH
        return keys[:, :end], values[:, :end]

    def advance(self, n_tokens: int) -> None:
        """Count ``n_tokens`` that every layer has stored."""
        self.length += n_tokens
        self._beyond = self._is_beyond(self.length)

    def continues(self, n_tokens: int) -> bool:
        """Whether ``n_tokens`` can follow what is held.

        Where LongRoPE changes its angles with the length of the sequence, they change for all of its tokens: those
        held are of no use then, and the whole sequence has to run anew.
        """
        return self.length == 0 or self._is_beyond(self.length + n_tokens) == self._beyond

    def _is_beyond(self, length: int) -> bool:
        return self._border is not None and length > self._border

    def reserve(self, capacity: int) -> None:
        """Make room for at least ``capacity`` tokens per row; what is held stays."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, 2 * self.capacity)
        self._keys = [self._grown(held, capacity) for held in self._keys]
        self._values = [self._grown(held, capacity) for held in self._values]
        self.capacity = capacity

    def _grown(self, held: Tensor, capacity: int) -> Tensor:
        grown = held.new_zeros(held.shape[0], capacity, *held.shape[2:])
        grown[:, : self.length] = held[:, : self.length]
        return grown

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one that is named twice becomes two."""
        index = torch.tensor(rows, device=self._keys[0].device)
        self._keys = [self._selected(held, index) for held in self._keys]
        self._values = [self._selected(held, index) for held in self._values]

    def _selected(self, held: Tensor, index: Tensor) -> Tensor:
        selected = held.new_zeros(len(index), *held.shape[1:])
        torch.index_select(held[:, : self.length], 0, index, out=selected[:, : self.length])
        return selected

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        assert 0 <= length <= self.length
        self.length = length
