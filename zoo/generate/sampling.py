"""From logits to the next token, as a chain of small steps over (V,) float32 logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import InputError, ZooError

_WARM = "0 (greedy) or above"


class Sampler(Protocol):
    """One step: returns changed logits; a token at minus infinity is never drawn."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """``seen``: ids of the prompt and of what was generated so far."""


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide positive logits of seen tokens by ``penalty``, multiply negative ones (CTRL, arXiv 1909.05858)."""

    penalty: float

    def __post_init__(self) -> None:
        _check(self.penalty > 0, "repetition_penalty", self.penalty, "above 0 (1 changes nothing)")

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        ids = torch.tensor(sorted(set(seen)), device=logits_V.device, dtype=torch.int64)
        picked = logits_V[ids]
        return logits_V.index_copy(0, ids, torch.where(picked > 0, picked / self.penalty, picked * self.penalty))


@dataclass(frozen=True)
class Temperature:
    """Divide by ``temperature``."""

    temperature: float

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "temperature", self.temperature, _WARM)

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V / self.temperature


@dataclass(frozen=True)
class TopK:
    """Keep the ``k`` likeliest tokens (and those as likely as the last of them)."""

    k: int

    def __post_init__(self) -> None:
        _check(self.k >= 1, "top_k", self.k, "0 (off) or above")

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        least = logits_V.topk(min(self.k, logits_V.shape[-1])).values[-1]
        return logits_V.masked_fill(logits_V < least, -math.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest likeliest tokens that make up probability ``p`` (nucleus sampling, arXiv 1904.09751)."""

    p: float

    def __post_init__(self) -> None:
        _check(0 < self.p <= 1, "top_p", self.p, "above 0 and at most 1 (1 is off)")

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        ordered, index = logits_V.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = index[before >= self.p]  # the likeliest token has nothing before it: it always stays
        return logits_V.index_fill(0, dropped, -math.inf)


@dataclass(frozen=True)
class MinP:
    """Keep tokens at least ``p`` times as likely as the likeliest (arXiv 2407.01082)."""

    p: float

    def __post_init__(self) -> None:
        _check(0 <= self.p <= 1, "min_p", self.p, "within 0..1 (0 is off)")

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        least = logits_V.max() + math.log(self.p) if self.p else -math.inf
        return logits_V.masked_fill(logits_V < least, -math.inf)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is drawn. ``temperature`` 0 is greedy: the likeliest token, whatever the seed."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    extra: tuple[Sampler, ...] = ()
    """Further steps (from plugins), run after the built-in ones."""

    def __post_init__(self) -> None:
        _check(self.temperature >= 0 and math.isfinite(self.temperature), "temperature", self.temperature, _WARM)
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or above")
        _check(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "within 0..2**63-1")
        # Made even where they are not used: greedy decoding must not swallow a wrong value.
        RepetitionPenalty(self.repetition_penalty), TopP(self.top_p), MinP(self.min_p)

    def chain(self) -> list[Sampler]:
        """The steps, in the order in which ``transformers`` runs them; those that change nothing are left out."""
        steps: list[Sampler] = []
        if self.repetition_penalty != 1:
            steps.append(RepetitionPenalty(self.repetition_penalty))
        if self.temperature > 0:
            if self.temperature != 1:
                steps.append(Temperature(self.temperature))
            if self.top_k:
                steps.append(TopK(self.top_k))
            if self.top_p != 1:
                steps.append(TopP(self.top_p))
            if self.min_p != 0:
                steps.append(MinP(self.min_p))
        return [*steps, *self.extra]


class TokenSampler:
    """Draws tokens by the options, with a random stream of its own.

    Args:
        stream: number of the sample; samples of one seed differ and are reproducible one by one.
    """

    def __init__(self, options: SamplingOptions, *, stream: int = 0) -> None:
        self._chain = options.chain()
        self._greedy = options.temperature == 0
        self._generator = torch.Generator()  # the CPU's, wherever the model is: one seed, one result
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed + stream)

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> int:
        """The next token's id.

        Raises:
            ZooError: the logits hold no finite number to draw from.
        """
        if self._greedy:
            return int(self._changed(logits_V, seen).argmax())
        return self.draw(self.probabilities(logits_V, seen))

    def probabilities(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """What `__call__` draws from, float32 on the CPU; greedy, all of it on one token. Raises as `__call__`."""
        changed_V = self._changed(logits_V, seen)
        if self._greedy:
            return torch.zeros(len(changed_V)).index_fill_(0, changed_V.argmax().cpu(), 1.0)
        return changed_V.softmax(-1).cpu()

    def draw(self, weights_V: Tensor) -> int:
        """An index, with probability in proportion to its weight; one of weight 0 never comes."""
        cumulative_V = weights_V.double().cumsum(-1)
        return int(torch.searchsorted(cumulative_V, cumulative_V[-1] * self.uniform(), right=True))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def _changed(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        logits_V = logits_V.float()
        for step in self._chain:
            logits_V = step(logits_V, seen)
        if not logits_V.max().isfinite():
            raise ZooError("the model's logits are not finite numbers.", fix="Its weights are damaged, or try 32-true.")
        return logits_V


def _check(good: bool, name: str, value: float | None, allowed: str) -> None:
    if not good:
        raise InputError(f"{name} must be {allowed}, not {value}.")
