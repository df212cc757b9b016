"""Weight-only quantization: linears whose weights are small integers, and how one is made from a float weight.

Shape letters: D_out, D_in of a linear's weight, G groups of a row, T tokens (all leading dimensions flattened).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import UnavailableError
from zoo.registry import Registry


class QuantizedLinear(nn.Module, ABC):
    """A linear layer with integer weights; its bias, if any, stays a parameter."""

    bias: nn.Parameter | None
    kernel_tokens: ClassVar[int]
    """Up to so many tokens the integer kernel is faster than unpacking the weight for a matrix product."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_parameter("bias", None)

    @classmethod
    @abstractmethod
    def from_float(cls, weight: Tensor, dtype: torch.dtype) -> QuantizedLinear:
        """Quantize a (D_out, D_in) weight for inputs of ``dtype``."""

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weight that this layer multiplies with, (D_out, D_in) in the dtype of its inputs."""

    @abstractmethod
    def kernel(self, x_TD: Tensor) -> Tensor:
        """The product of x and the transposed weight, (T, D_out), by an integer kernel."""

    @property
    @abstractmethod
    def has_kernel(self) -> bool:
        """Whether there is an integer kernel for this device, dtype and shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out)."""
        x_TD = x.reshape(-1, self.in_features)
        if self.has_kernel and x_TD.shape[0] <= self.kernel_tokens:
            y_TD = self.kernel(x_TD)
        else:
            y_TD = F.linear(x_TD, self.dequantized())
        y = y_TD.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Quantizer(Protocol):
    """Which linears of a model are quantized, and how."""

    name: str

    def supports(self, device: str) -> list[str]:
        """Why it can not run on a device type, one sentence each; empty: it can."""

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        """The layer that replaces a linear of this role (``attn.q``, ``head``); ``None`` leaves it alone."""


def choose_quantizer(name: str, *, device: str, registry: Registry) -> Quantizer:
    """The quantizer of that name.

    Raises:
        UnknownNameError: no quantizer has this name.
        UnavailableError: it can not run on the device.
    """
    quantizer: Quantizer = registry.load("quantizer", name)()
    if reasons := quantizer.supports(device):
        raise UnavailableError(f"quantizer {name!r} can not be used: {'; '.join(reasons)}.", fix="Take int8, or none.")
    return quantizer
