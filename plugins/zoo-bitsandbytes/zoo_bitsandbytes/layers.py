"""Linears whose products bitsandbytes computes. For the backward pass they keep their integers, and no other weight.

Shape letters: D_out, D_in of a linear's weight, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from zoo.precision.quantization import Layout, QuantizedLinear
from zoo_bitsandbytes.install import load_bitsandbytes

BLOCK = 64
"""Values that share a factor, as in QLoRA."""
OUTLIER = 6.0
"""LLM.int8() computes columns with an input beyond it in half precision."""

# At every product: it would be said thousands of times that inputs are rounded to float16.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast" not in record.getMessage()
)


class BitsandbytesLinear(QuantizedLinear):
    """A frozen weight; inputs and bias may have gradients."""

    kernel_tokens = 1 << 62  # bitsandbytes itself chooses between its kernels and unpacking
    inputs: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return self.inputs

    @property
    def has_kernel(self) -> bool:
        """Always: bitsandbytes computes every product."""
        return True


class FourBitLinear(BitsandbytesLinear):
    """Two values a byte, which stand for one of 16 levels times the largest of their block.

    Args:
        values: (D_out, D_in / 2) uint8.
        absmax: (D_out, D_in / BLOCK) float32.
        dtype: of the inputs.
    """

    quant_type: ClassVar[str]
    values: Tensor
    absmax: Tensor
    code: Tensor

    def __init__(self, values: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
        super().__init__(2 * values.shape[1], values.shape[0])
        self.inputs = dtype
        self.register_buffer("values", values)
        self.register_buffer("absmax", absmax)
        code = load_bitsandbytes().functional.get_4bit_type(self.quant_type, device=values.device)
        self.register_buffer("code", code, persistent=False)

    @staticmethod
    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """As `QuantizedLinear.layout`; factors are float32 whatever the inputs."""
        d_out, d_in = shape
        return {"values": ((d_out, d_in // 2), torch.uint8), "absmax": ((d_out, d_in // BLOCK), torch.float32)}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Self:
        """As `QuantizedLinear.from_stored`."""
        return cls(tensors["values"], tensors["absmax"].float(), dtype)

    def dequantized(self) -> Tensor:
        """(D_out, D_in), as bitsandbytes unpacks it."""
        unpacked: Tensor = load_bitsandbytes().functional.dequantize_4bit(self.values.view(-1, 1), self._state())
        return unpacked

    def kernel(self, x_TD: Tensor) -> Tensor:
        """(T, D_out)."""
        y_TF: Tensor = load_bitsandbytes().matmul_4bit(x_TD, self.values.view(-1, 1), self._state())
        return y_TF

    def _state(self) -> Any:
        return load_bitsandbytes().functional.QuantState(
            absmax=self.absmax.flatten(),
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=self.inputs,
        )


def _quantize_4bit(weight: Tensor, quant_type: str) -> dict[str, Tensor]:
    values, state = load_bitsandbytes().functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=quant_type
    )
    rows = weight.shape[0]
    return {"values": values.view(rows, -1), "absmax": state.absmax.view(rows, -1)}


class NF4Linear(FourBitLinear):
    """Levels are quantiles of a normal distribution."""

    quant_type = "nf4"

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `QuantizedLinear.quantize`."""
        return _quantize_4bit(weight, "nf4")


class FP4Linear(FourBitLinear):
    """Levels are floating-point numbers."""

    quant_type = "fp4"

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `QuantizedLinear.quantize`."""
        return _quantize_4bit(weight, "fp4")


class LLMInt8Linear(BitsandbytesLinear):
    """Integers within -127..127, and the largest value of each row.

    Args:
        integers: (D_out, D_in) int8.
        absmax: (D_out,) float32.
        dtype: of the inputs.
    """

    integers: Tensor
    absmax: Tensor

    def __init__(self, integers: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
        super().__init__(integers.shape[1], integers.shape[0])
        self.inputs = dtype
        self.register_buffer("integers", integers)
        self.register_buffer("absmax", absmax)

    @staticmethod
    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """As `QuantizedLinear.layout`; factors are float32 whatever the inputs."""
        return {"integers": (shape, torch.int8), "absmax": (shape[:1], torch.float32)}

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `QuantizedLinear.quantize`; bitsandbytes takes float16."""
        integers, absmax, _ = load_bitsandbytes().functional.int8_vectorwise_quant(weight.half().contiguous())
        return {"integers": integers, "absmax": absmax.float()}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Self:
        """As `QuantizedLinear.from_stored`."""
        return cls(tensors["integers"], tensors["absmax"].float(), dtype)

    def dequantized(self) -> Tensor:
        """(D_out, D_in)."""
        return (self.integers * (self.absmax / 127)[:, None]).to(self.inputs)

    def kernel(self, x_TD: Tensor) -> Tensor:
        """(T, D_out)."""
        bitsandbytes = load_bitsandbytes()
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.integers, self.absmax, OUTLIER
        state.has_fp16_weights, state.is_training = False, self.training
        y_TF: Tensor = bitsandbytes.matmul(x_TD, self.integers, state=state)
        return y_TF
