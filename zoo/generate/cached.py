"""A model together with the tokens whose keys and values it has at hand.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapted, Prompts
from zoo.generate.compile import CompiledDecoding
from zoo.models.cache import KVCache
from zoo.models.decoder import Decoder, SequenceCache


class CachedTokens:
    """One sequence of tokens and its cache: only what is new runs through the model."""

    def __init__(self, model: Decoder, step: CompiledDecoding | None = None) -> None:
        self.model = model
        self.device = model.device
        self._step = step
        self._ids: list[int] = []
        self._cache: SequenceCache | None = None
        self._computed_by: Hashable = None

    def start(self, ids: Sequence[int], capacity: int) -> list[int]:
        """Keep what the cache shares with ``ids`` and make room for ``capacity`` tokens.

        Returns:
            The ids that are still to run: at least the last one, whose logits are wanted.
        """
        if self._computed_by != (computes := _computation(self.model)):
            self._ids, self._cache, self._computed_by = [], None, computes
        shared = 0
        for ours, theirs in zip(self._ids, ids[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if self._cache is None:
            self._cache = self.model.new_cache(capacity)
        self.truncate(shared)
        if not self._cache.continues(len(ids) - shared):
            self.truncate(shared := 0)
        self._cache.reserve(capacity)
        return list(ids[shared:])

    @torch.inference_mode()
    def run(self, ids: Sequence[int], *, last_only: bool = True) -> Tensor:
        """Run ``ids`` after what the cache holds; logits of the last one (1, V), or of each (T, V)."""
        assert self._cache is not None
        n_wanted = 1 if last_only else len(ids)
        if not self._cache.continues(len(ids)):
            ids = [*self._ids, *ids]
            self.truncate(0)
        tokens_BT = torch.tensor([ids], device=self.device)
        if self._step is not None and len(ids) == 1 and self._cache.length > 0:
            assert isinstance(self._cache, KVCache)
            logits_TV = self._step(tokens_BT, self._cache)[0]
        else:
            logits_TV = self.model(tokens_BT, cache=self._cache, last_only=last_only)[0]
        self._ids += ids
        return logits_TV[-n_wanted:]

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        assert self._cache is not None
        del self._ids[length:]  # first: an interrupt in between must not leave ids that the cache does not hold
        self._cache.truncate(length)


def _computation(model: Decoder) -> Hashable:
    """Changes with the weights and with the active adapters; keys and values of another computation are of no use."""
    if not isinstance(model, nn.Module):
        return None  # it keeps tokens only
    active = tuple(module.active for module in model.modules() if isinstance(module, Adapted | Prompts))
    tensors = list(chain(model.parameters(), model.buffers()))
    versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    # torch's fused optimizers change values without a new version: look at an end of each as well.
    ends = [t.detach()[(-1,) * t.ndim].float() for t in tensors if t.requires_grad]
    return active, versions, tuple(torch.stack(ends).tolist()) if ends else ()
