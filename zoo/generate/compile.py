"""Compiled decoding: one graph for one token, weights frozen into it, a cache of fixed length."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UnavailableError
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.models.static_cache import StaticKVCache

SMALLEST_CONTEXT = 256
_OPTIONS: dict[str, Any] = {"freezing": True, "max_autotune": True}


class CompiledDecoding:
    """Runs single tokens through a compiled model; compiles at the first one, and again when the context doubles.

    Args:
        report: told when a compilation begins, which takes about a minute the first time and is cached on disk.

    Raises:
        UnavailableError: there is no C++ compiler.
    """

    def __init__(self, model: GPT, *, report: Callable[[str], None] = lambda line: None) -> None:
        require_compiler()
        keep_on_disk()
        self._model = model.requires_grad_(False)
        self._report = report
        self._compiled_for: set[int] = set()
        self._step = torch.compile(self._forward, dynamic=False, fullgraph=True, options=_OPTIONS)

    def capacity(self, n_tokens: int) -> int:
        """Length of the cache to allocate for ``n_tokens``: few lengths mean few compilations."""
        return max(SMALLEST_CONTEXT, 1 << (n_tokens - 1).bit_length())

    def __call__(self, tokens_BT: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, 1, V) of one token per row after what the cache holds; the cache grows by it."""
        if cache.capacity not in self._compiled_for:
            self._compiled_for.add(cache.capacity)
            self._report(f"compiling for {cache.capacity} tokens of context; the first time takes a minute")
        position_T = torch.tensor([cache.length], device=tokens_BT.device)
        logits: Tensor = self._step(tokens_BT, position_T, *cache.tensors)
        cache.advance(1)
        return logits

    def _forward(self, tokens_BT: Tensor, position_T: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        cache = StaticKVCache(keys, values, position_T)
        return self._model(tokens_BT, positions_BT=position_T[None], mask=cache.mask, cache=cache, last_only=True)


def require_compiler() -> None:
    """Check for what inductor needs on a CPU.

    Raises:
        UnavailableError: there is no C++ compiler.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in names):
        raise UnavailableError(
            f"--compile needs a C++ compiler, and {' and '.join(names)} can not be found.",
            fix="Install one (apt install g++, xcode-select --install), or set CXX.",
        )


def keep_on_disk() -> None:
    """Keep compiled code where it survives a restart, unless the user has chosen a place."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zoo" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default))
