"""int8 with one thing wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.precision.int8 import Int8, Int8Linear
from zoo.precision.quantization import Layout, QuantizedLinear


def _quantizer(layer: type[QuantizedLinear]) -> type[Int8]:
    class Mutated(Int8):
        name = "mutant"

        def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear]:
            return layer

    return Mutated


class _WrongScale(Int8Linear):
    def dequantized(self) -> Tensor:
        return super().dequantized() * 127 / 128 * 1.3


class _OneScale(Int8Linear):
    """One for all rows."""

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        scale = (weight.abs().max() / 127).expand(weight.shape[0]).to(dtype).contiguous()
        return {"integers": (weight / scale.float()[:, None]).round().to(torch.int8), "scale": scale}


class _Clipped(Int8Linear):
    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return Int8Linear.quantize(weight.clamp(-5, 5), dtype)


class _NotANumber(Int8Linear):
    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        found = Int8Linear.quantize(weight, dtype)
        return {**found, "scale": found["scale"].masked_fill(~weight.any(dim=1), float("nan"))}


class _SavesNothing(Int8Linear):
    """The weight is kept beside its integers."""

    @staticmethod
    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        return {**Int8Linear.layout(shape, dtype), "weight": (shape, dtype)}

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {**Int8Linear.quantize(weight, dtype), "weight": weight.to(dtype)}


class _BiasDropped(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        kept, self.bias = self.bias, None
        found = super().forward(x)
        self.bias = kept
        return found


class _OtherKernel(Int8Linear):
    """The integer kernel computes something else than the weight says."""

    def kernel(self, x_TD: Tensor) -> Tensor:
        return super().kernel(x_TD) * 1.1


class _NotStored(Int8Linear):
    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(weight, scale)
        self.register_buffer("scale", scale, persistent=False)


class _NoGradient(Int8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + 0 * x.sum()


class _Trained(Int8Linear):
    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(weight, scale)
        del self.scale
        self.scale = torch.nn.Parameter(scale)


WrongScale = _quantizer(_WrongScale)
OneScale = _quantizer(_OneScale)
Clipped = _quantizer(_Clipped)
NotANumber = _quantizer(_NotANumber)
SavesNothing = _quantizer(_SavesNothing)
BiasDropped = _quantizer(_BiasDropped)
OtherKernel = _quantizer(_OtherKernel)
NotStored = _quantizer(_NotStored)
NoGradient = _quantizer(_NoGradient)
Trained = _quantizer(_Trained)


class NoReasons(Int8):
    name = "mutant"

    def supports(self, device: str) -> Any:
        return device == "cpu"
