"""int8 weights with one scale per output channel.

Shape letters: D_out, D_in of a linear's weight, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.precision.quantization import Layout, QuantizedLinear


class Int8Linear(QuantizedLinear):
    """weight = integers * scale, row by row, the largest of each row at 127.

    Args:
        weight: (D_out, D_in) int8.
        scale: (D_out,) in the dtype of the inputs.
    """

    kernel_tokens = 16
    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @staticmethod
    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        return {"integers": (shape, torch.int8), "scale": (shape[:1], dtype)}

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Round to the nearest; the scale is rounded to ``dtype`` first, so that its own error is made up for."""
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)
        integers = (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return {"integers": integers, "scale": scale}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Self:
        return cls(tensors["integers"], tensors["scale"].to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def dequantized(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def rows(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.scale.dtype) * self.scale[tokens_BT][..., None]

    def kernel(self, x_TD: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_TD, self.weight, self.scale)

    @property
    def has_kernel(self) -> bool:
        return self.weight.device.type == "cpu" and self.scale.dtype == torch.bfloat16


class Int8:
    """Every linear, the head included."""

    name = "int8"

    def supports(self, device: str) -> list[str]:
        """Everywhere; off the CPU the weights are unpacked for each product, which saves memory and no time."""
        return []

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        """The same for every role."""
        return Int8Linear
