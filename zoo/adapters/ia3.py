"""(IA)^3 (arXiv 2205.05638): learned factors on keys, values and the input of the last feed-forward linear."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Part
from zoo.adapters.plans import IA3Options
from zoo.adapters.weights import device_of
from zoo.plan.sites import Addition


class IA3(Adapter):
    """Scales the outputs of some linears, and the inputs of others, by factors that start at one."""

    options_type: ClassVar[type] = IA3Options
    learning_rate: ClassVar[float] = 5e-3

    def part(self, addition: Addition, base: nn.Module) -> Part:
        """A factor for each output or input, float32."""
        return IA3Input(addition, base) if "ia3_input" in addition.shapes else IA3Output(addition, base)


class IA3Output(Part):
    """W x + b becomes l * (W x + b)."""

    def __init__(self, addition: Addition, base: nn.Module) -> None:
        super().__init__()
        self.ia3_output = nn.Parameter(torch.ones(addition.shapes["ia3_output"], device=device_of(base)))

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return (y * self.ia3_output).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.ia3_output[:, None], None if bias is None else bias * self.ia3_output


class IA3Input(Part):
    """W x + b becomes W (l * x) + b."""

    def __init__(self, addition: Addition, base: nn.Module) -> None:
        super().__init__()
        self.ia3_input = nn.Parameter(torch.ones(addition.shapes["ia3_input"], device=device_of(base)))

    def before(self, x: Tensor) -> Tensor:
        return (x * self.ia3_input).to(x.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.ia3_input, bias
