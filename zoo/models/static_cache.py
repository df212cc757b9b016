"""A key/value cache for compiled decoding: tensors, and where to write into them.

Shape letters: B batch, T new tokens, S tokens that the tensors have room for, K kv heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.models.masks import Mask


class StaticKVCache:
    """Keys and values (B, S, K, H) of every layer, into which T tokens are written at given positions.

    Args:
        positions_T: int64, where the new tokens go.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions_T: Tensor) -> None:
        self._keys, self._values, self._positions_T = keys, values, positions_T
        self.length = 0  # nobody may count from it: whoever uses this cache gives the positions

    @property
    def mask(self) -> Mask:
        """Causal, with the queries where they are written; what lies beyond them is hidden."""
        return Mask(queries_T=self._positions_T)

    def continues(self, n_tokens: int) -> bool:
        """Always: who decodes with it has asked the cache that it is a view of."""
        return True

    def append(self, layer: int, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns the whole tensors, room for later tokens included."""
        self._keys[layer].index_copy_(1, self._positions_T, k_BTKH.to(self._keys[layer].dtype))
        self._values[layer].index_copy_(1, self._positions_T, v_BTKH.to(self._values[layer].dtype))
        return self._keys[layer], self._values[layer]

    def advance(self, n_tokens: int) -> None:
        """Nothing: the positions say it."""
