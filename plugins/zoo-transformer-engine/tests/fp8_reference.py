"""FP8 written out a second time: from the definition of the formats and of the recipes, with no FP8 dtype of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
"""Bits of the mantissa, smallest exponent of a normal number, largest number."""


def rounded(x: Tensor, form: tuple[int, int, float]) -> Tensor:
    """To the nearest number of a format, ties to even; what is too large to the largest."""
    bits, smallest, largest = form
    exponent = torch.floor(torch.log2(x.double().abs().clamp(min=1e-300))).clamp(min=smallest)
    step = 2.0 ** (exponent - bits)
    return ((x.double() / step).round() * step).clamp(-largest, largest)


def fake(x: Tensor, scale: float, form: tuple[int, int, float]) -> Tensor:
    """A tensor in FP8 and back, with one factor."""
    return rounded(x * torch.tensor(scale, dtype=torch.float32), form) / scale


def fake_blocks(x: Tensor, dim: int, form: tuple[int, int, float]) -> Tensor:
    """A matrix in MXFP8 and back, in blocks of 32 along a dimension."""
    result = x.double().clone()
    for block in result.split(32, dim=dim):
        for line in block.unbind(1 - dim):
            if (amax := line.abs().max().item()) > 0:
                scale = 2.0 ** -math.ceil(math.log2(amax / form[2]))
                line.copy_(rounded(line * scale, form) / scale)
    return result


@dataclass
class DelayedTensor:
    """One tensor of delayed scaling: its largest values so far, and the factor of the next step."""

    form: tuple[int, int, float]
    length: int
    algorithm: str
    margin: int
    scale: float = 1.0
    seen: list[float] = field(default_factory=list)

    def fake(self, x: Tensor) -> Tensor:
        self.now = x.abs().max().item()
        return fake(x, self.scale, self.form)

    def end_step(self) -> None:
        self.seen = [*self.seen, self.now][-self.length :]
        amax = max(self.seen) if self.algorithm == "max" else self.seen[-1]
        if amax > 0:
            self.scale = self.form[2] / amax / 2**self.margin


def products(
    x: Tensor, w: Tensor, g: Tensor, operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y without its bias, dx, dw, db; the operands are those of x w^T, g w and g^T x."""
    x_y, w_y, g_x, w_x, g_w, x_w = operands
    return x_y @ w_y.T, g_x @ w_x, g_w.T @ x_w, g.double().sum(0)
