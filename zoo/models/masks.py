"""Which keys a query may see, as a description that no backend can forget.

Shape letters: B batch, T query tokens, S key/value tokens. The T queries are always the last T of the S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """A key is visible when all of these allow it; there is no "no mask".

    Attributes:
        causal: no key after the query.
        window: at most this many keys back, the query's own included.
        prefix: the first ``prefix`` keys are visible to every query, whatever ``causal`` and ``window`` say.
        documents_BS: integer document of every key; only keys of the query's own document are visible.
    """

    causal: bool = True
    window: int | None = None
    prefix: int = 0
    documents_BS: Tensor | None = None

    @property
    def features(self) -> frozenset[str]:
        """What a backend must be able to do, in words."""
        flags = {
            "causal": self.causal,
            "full": not self.causal,
            "window": self.window is not None,
            "prefix": self.prefix > 0,
            "documents": self.documents_BS is not None,
        }
        return frozenset(name for name, on in flags.items() if on)

    @property
    def is_plain(self) -> bool:
        """Nothing but causal, or nothing at all."""
        return self.window is None and self.prefix == 0 and self.documents_BS is None

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
        query_pos = key_pos[n_keys - n_queries :, None]
        allowed = self.visible(query_pos, key_pos)[None, None]
        if self.documents_BS is not None:
            documents = self.documents_BS[:, None, :]
            same = documents[..., n_keys - n_queries :, None] == documents[..., None, :]
            allowed = allowed & same
        return allowed


CAUSAL = Mask()
"""Every query sees itself and all keys before it."""
