"""Compiled decoding: one graph for one token, after a context of any length."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UnavailableError
from zoo.generate.one_token import one_token_model
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.models.static_cache import StaticKVCache

_ANYWHERE: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}  # of hundreds of weights per token
_ON_CPU: dict[str, Any] = _ANYWHERE | {"cpp.enable_floating_point_contract_flag": "fast"}
_ELSEWHERE: dict[str, Any] = _ANYWHERE | {"max_autotune": True}


class CompiledDecoding:
    """Runs single tokens through a compiled model; compiles at the first one, for contexts of any length.

    Args:
        report: told when a compilation begins, which takes about a minute the first time and is cached on disk.

    Raises:
        UnavailableError: there is no C++ compiler.
    """

    def __init__(self, model: GPT, *, report: Callable[[str], None] = lambda line: None) -> None:
        require_compiler()
        keep_on_disk()
        on_cpu = model.device.type == "cpu"
        self._model = one_token_model(model) if on_cpu else model.requires_grad_(False)
        # Nothing that a guard looks at can change; looking would cost a millisecond per token.
        self._options = dict(_ON_CPU if on_cpu else _ELSEWHERE, guard_filter_fn=torch.compiler.skip_all_guards_unsafe)
        self._report = report
        self._step: Callable[..., Tensor] | None = None

    def __call__(self, tokens_BT: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, 1, V) of a token (1, 1) after those that the cache holds, at least one; the cache grows by it."""
        assert cache.length > 0  # a length of one would be compiled for as such
        n_keys = cache.length + 1
        keys, values = ([held[:, :n_keys] for held in tensors] for tensors in cache.tensors)
        position_T = torch.tensor([cache.length], device=tokens_BT.device)
        if self._step is None:
            self._report("compiling; the first time takes a minute")
            self._step = torch.compile(_fresh(_step), fullgraph=True, options=self._options)
            for tensor in (*keys, *values):
                torch._dynamo.mark_dynamic(tensor, 1)
        logits: Tensor = self._step(self._model, tokens_BT, position_T, keys, values)
        cache.advance(1)
        return logits


def _step(model: GPT, tokens_BT: Tensor, position_T: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    cache = StaticKVCache(keys, values, position_T)
    return model(tokens_BT, positions_BT=position_T[None], mask=cache.mask, cache=cache, last_only=True)


def _fresh(function: Any) -> Any:
    """A copy with a code object of its own: compiled graphs belong to those, and here without any guard."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


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
