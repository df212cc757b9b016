"""The decoder. Read this first, then `block`.

Shape letters: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.models.attention import Attend, Attention
from zoo.models.block import BLOCKS
from zoo.models.cache import Cache, KVCache
from zoo.models.ends import SoftCap, build_embedding
from zoo.models.masks import CAUSAL, Mask
from zoo.models.mlp import GatedMLP
from zoo.models.norm import build_norm
from zoo.models.positions import build_positions
from zoo.spec import ModelSpec


class GPT(nn.Module):
    """A decoder-only transformer, assembled from a spec.

    Args:
        spec: its architecture.
        attend: the attention backend that every layer calls.
    """

    def __init__(self, spec: ModelSpec, attend: Attend) -> None:
        super().__init__()
        self.spec = spec
        self.embed = build_embedding(spec)
        self.positions = build_positions(spec)
        self.dropout = nn.Dropout(spec.embed_dropout)
        self.blocks = nn.ModuleList(BLOCKS[spec.block](spec, i, attend) for i in range(spec.n_layers))
        self.norm = build_norm(spec)
        self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=spec.head_bias)
        self.cap = nn.Identity() if spec.head_softcap is None else SoftCap(spec.head_softcap)
        self.tie()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: that of the parameters, or of the scales of quantized ones."""
        return next(t.dtype for t in self._tensors() if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        return chain(self.parameters(), self.buffers())

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for so many tokens per row."""
        return KVCache(self.spec, capacity=capacity, batch=batch, dtype=self.dtype, device=self.device)

    def tie(self) -> None:
        """Make the head share the embedding's weight, if the spec says so. Needed after weights are replaced."""
        if self.spec.tie_embeddings:
            self.head.weight = self.embed.weight

    def join(self) -> None:
        """Lay weights that share an input side by side, for one product without gradients. Copies them, layer by layer.

        For weights that are there as copies already, and not mapped from a file.
        """
        for module in self.modules():
            if isinstance(module, Attention | GatedMLP):
                module.join()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        mask: Mask = CAUSAL,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits for the next token.

        Args:
            tokens_BT: int64 ids. With a cache they follow the tokens that it holds.
            positions_BT: int64 positions; by default they count up from the cache's length.
            mask: which keys each token may see.
            cache: read, extended by T tokens and advanced.
            last_only: compute the logits of the last position only, as prefill needs.

        Returns:
            Logits (B, T, V), or (B, 1, V), in the dtype of the weights.

        Raises:
            ZooError: what the cache holds can not be continued: see `KVCache.continues`.
        """
        hidden_BTD = self.hidden(tokens_BT, positions_BT=positions_BT, mask=mask, cache=cache)
        return self.logits(hidden_BTD[:, -1:] if last_only else hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits of what `hidden` returned, or of some of its positions: (..., D) to (..., V)."""
        logits: Tensor = self.cap(self.head(hidden_BTD))
        return logits

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        mask: Mask = CAUSAL,
        cache: Cache | None = None,
    ) -> Tensor:
        """The normalized residual stream (B, T, D) that `logits` projects. Arguments and errors as in `forward`."""
        n_tokens = tokens_BT.shape[1]
        if cache is not None and not cache.continues(n_tokens):
            raise ZooError(
                f"{n_tokens} tokens can not follow the {cache.length} in the cache: rotary positions change with the "
                "length of the sequence there.",
                fix="Run the whole sequence anew: cache.truncate(0).",
            )
        if positions_BT is None:
            start = cache.length if cache is not None else 0
            positions_BT = torch.arange(start, start + n_tokens, device=tokens_BT.device)[None]
        x_BTD, rotation = self.positions(self.embed(tokens_BT), positions_BT)
        x_BTD = self.dropout(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, mask, cache)
        if cache is not None:
            cache.advance(n_tokens)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD
