"""Which keys a query may see, as a description that no backend can forget.

Shape letters: B batch, T query tokens, S key/value tokens. The T queries are always the last T of the S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from zoo.models.rows import Rows


@dataclass(frozen=True, eq=False)
class Mask:
    """A key is visible when all of these allow it; there is no "no mask".

    Attributes:
        causal: no key after the query.
        window: at most this many keys back, the query's own included.
        prefix: the first ``prefix`` keys are visible to every query, whatever ``causal`` and ``window`` say.
        documents_BS: integer document of every key; only keys of the query's own document are visible.
        padding_B: so many keys at the start of each row are padding, hidden from every query.
        queries_T: where among the keys the queries are, if not at the end (a cache of fixed length has room left).
        rows: the sequences that the tokens form; each is causal, and nothing else can be said of it.
    """

    causal: bool = True
    window: int | None = None
    prefix: int = 0
    documents_BS: Tensor | None = None
    padding_B: Tensor | None = None
    queries_T: Tensor | None = None
    rows: Rows | None = None

    def __post_init__(self) -> None:
        assert self.rows is None or self.features == {"causal"}

    @property
    def features(self) -> frozenset[str]:
        """What a backend must be able to do, in words."""
        flags = {
            "causal": self.causal,
            "full": not self.causal,
            "window": self.window is not None,
            "prefix": self.prefix > 0,
            "documents": self.documents_BS is not None,
            "padding": self.padding_B is not None,
            "queries": self.queries_T is not None,
        }
        return frozenset(name for name, on in flags.items() if on)

    def is_plain(self, n_keys: int) -> bool:
        """Whether among ``n_keys`` it is nothing but causal, or nothing at all; a window that wide hides nothing."""
        no_window = self.window is None or (self.causal and self.window >= n_keys)
        tensors = (self.documents_BS, self.padding_B, self.queries_T)
        return no_window and self.prefix == 0 and all(tensor is None for tensor in tensors)

    def narrowed(self, window: int | None) -> Mask:
        """This mask with a layer's own window on top: the same object each time, so what is built from it keeps."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return _narrowed(self, window)

    def of_row(self) -> Mask:
        """The mask of the rows themselves: what a backend gets."""
        return self if self.rows is None else CAUSAL

    def visible(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        """Whether each key is visible to each query by position alone; positions broadcast against each other."""
        allowed = torch.ones_like(query_pos >= key_pos)
        if self.causal:
            allowed = allowed & (key_pos <= query_pos)
        if self.window is not None:
            allowed = allowed & (query_pos - key_pos < self.window)
        if self.prefix:
            allowed = allowed | (key_pos < self.prefix)
        return allowed

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """The mask as booleans, True where visible, shaped (1 or B, 1, T, S)."""
        key_pos = torch.arange(n_keys, device=device)
        query_pos = key_pos[n_keys - n_queries :] if self.queries_T is None else self.queries_T
        allowed = self.visible(query_pos[:, None], key_pos)[None, None]
        if self.documents_BS is not None:
            documents = self.documents_BS[:, None, :]
            same = documents[..., query_pos, None] == documents[..., None, :]
            allowed = allowed & same
        if self.padding_B is not None:
            allowed = allowed & (key_pos >= self.padding_B[:, None, None, None])
        return allowed


@lru_cache(maxsize=8)
def _narrowed(mask: Mask, window: int) -> Mask:
    return replace(mask, window=window)


CAUSAL = Mask()
"""Every query sees itself and all keys before it."""
