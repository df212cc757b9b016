"""Only some tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outsider:
    least: int = 0

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        changed = logits_V.clone()
        changed[: self.least] = -math.inf
        return changed
