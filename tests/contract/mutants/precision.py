"""Precisions with one thing wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from zoo.precision.base import Precision

OTHER_NAME = Precision(name="fp32", param_dtype=torch.float32)
INTEGERS = Precision(name="mutant", param_dtype=torch.int8)
DOUBLE = Precision(name="mutant", param_dtype=torch.float64)
USELESS = Precision(name="mutant", param_dtype=torch.float16, autocast_dtype=torch.float16)


@dataclass(frozen=True, kw_only=True)
class _Answering(Precision):
    def supports(self, device: str) -> Any:
        return "not here" if device == "cuda" else []


@dataclass(frozen=True, kw_only=True)
class _Nowhere(Precision):
    def supports(self, device: str) -> list[str]:
        return ["not today"]


STRING = _Answering(name="mutant", param_dtype=torch.float32)
NOWHERE = _Nowhere(name="mutant", param_dtype=torch.float32)
