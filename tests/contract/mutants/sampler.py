"""Samplers with one thing wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.generate.sampling import Temperature, TopK


class Inverted:
    """Makes the likeliest the least likely."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return -logits_V


class OwnSeed:
    """Gumbel noise, drawn anew each time from a generator of its own."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        noise = -torch.log(-torch.log(torch.rand(logits_V.shape, generator=generator)))
        return logits_V + noise


class TorchsSeed:
    """Noise from torch's random numbers."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V + torch.rand(logits_V.shape)


class InPlace:
    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V.mul_(2)


class Revives:
    """A finite number in place of minus infinity."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V.clamp(min=-1e4 if logits_V.numel() > 200 else -3.0)


class Remembers:
    """What was asked before counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        self.calls += 1
        return logits_V / self.calls


class Empties:
    """No token is left."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V.masked_fill(logits_V <= logits_V.max(), -math.inf)


class Short:
    """Cuts the vocabulary."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V[:10]


class OneMore(TopK):
    """Keeps k + 1."""

    def __init__(self, k: int) -> None:
        super().__init__(k + 1)


class Multiplies(Temperature):
    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V * self.temperature
