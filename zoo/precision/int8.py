"""int8 weights with one scale per output channel.

Shape letters: D_out, D_in of a linear's weight, T tokens, B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.precision.quantization import QuantizedLinear


class Int8Linear(QuantizedLinear):
    """weight = integers * scale, row by row, the largest of each row at 127."""

    kernel_tokens = 16
    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_float(cls, weight: Tensor, dtype: torch.dtype) -> Int8Linear:
        """Round to the nearest; the scale is rounded to ``dtype`` first, so that its own error is made up for."""
        weight = weight.float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)
        integers = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(integers, scale)

    def dequantized(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def kernel(self, x_TD: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_TD, self.weight, self.scale)

    @property
    def has_kernel(self) -> bool:
        return self.weight.device.type == "cpu" and self.scale.dtype == torch.bfloat16


class Int8Embedding(nn.Module):
    """The embedding of a model whose head is tied to it: looks rows up in the head's integers."""

    def __init__(self, head: Int8Linear, factor: float | None) -> None:
        super().__init__()
        self._head = [head]  # in a list, or its tensors would count twice
        self.factor = factor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Returns (B, T, D_in) in the dtype of the scale."""
        head = self._head[0]
        x_BTD = F.embedding(tokens_BT, head.weight).to(head.scale.dtype) * head.scale[tokens_BT][..., None]
        return x_BTD if self.factor is None else x_BTD * torch.tensor(self.factor, dtype=x_BTD.dtype)


class Int8:
    """Every linear, the head included."""

    name = "int8"

    def supports(self, device: str) -> list[str]:
        """Everywhere; off the CPU the weights are unpacked for each product, which saves memory and no time."""
        return []

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        """The same for every role."""
        return Int8Linear
