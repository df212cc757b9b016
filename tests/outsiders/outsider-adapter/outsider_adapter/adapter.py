"""A shift of the outputs."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, Part
from zoo.plan.sites import Addition

from .options import Options


class Shift(Part):
    def __init__(self, addition: Addition) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(addition.shapes["shift"]))

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return y + self.shift.to(y.dtype)


class Outsider(Adapter):
    options_type: ClassVar[type] = Options

    def part(self, addition: Addition, base: nn.Module) -> Part:
        return Shift(addition)
