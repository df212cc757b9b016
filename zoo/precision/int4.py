"""int4 weights in groups of 32 along the input, each group with a scale and a zero, as GGUF's Q4_1 has them.

Shape letters: D_out, D_in of a linear's weight, G = D_in / 32 groups of a row, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from zoo.precision.int8 import Int8Linear
from zoo.precision.quantization import Layout, QuantizedLinear

GROUP = 32
_ROWS = 256
"""Rows packed at a time, a multiple of every kernel's block."""


class Int4Linear(QuantizedLinear):
    """weight = scale * (integers - 8) + zero, integers within 0..15.

    Stored are ``nibbles`` (D_out, D_in / 2), in which byte i of a group holds the integers i (low) and i + 16 (high)
    as in GGUF's blocks, ``scale`` and ``zero``.

    Args:
        nibbles: (D_out, D_in / 2) uint8. Kept only where there is no kernel, and after `keep_nibbles`.
        scale, zero: (D_out, G), rounded to ``dtype``.
    """

    kernel_tokens = 1 << 62  # unpacking the kernel's layout costs as much as a product of hundreds of tokens
    packed: Tensor | None
    scale_and_zero: Tensor
    nibbles: Tensor | None

    def __init__(self, nibbles: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> None:
        super().__init__(2 * nibbles.shape[1], nibbles.shape[0])
        both = torch.stack((scale, zero), dim=-1).transpose(0, 1).to(dtype).contiguous()  # as the kernel wants them
        has_kernel = dtype == torch.bfloat16 and self.out_features % 16 == 0
        self.register_buffer("scale_and_zero", both)
        self.register_buffer("packed", _pack(nibbles) if has_kernel else None)
        self.register_buffer("nibbles", None if has_kernel else nibbles)

    @staticmethod
    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        d_out, d_in = shape
        groups = ((d_out, d_in // GROUP), dtype)
        return {"nibbles": ((d_out, d_in // 2), torch.uint8), "scale": groups, "zero": groups}

    @staticmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Spread each group's range evenly over 16 levels."""
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        integers = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, 15).to(torch.uint8)
        return {"nibbles": _nibbles(integers), "scale": scale.to(dtype), "zero": (low + 8 * scale).to(dtype)}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Self:
        return cls(tensors["nibbles"], tensors["scale"], tensors["zero"], dtype)

    def keep_nibbles(self) -> None:
        """Hold them beside the kernel's layout: for loops that read them, and to unpack for many tokens."""
        self.nibbles = _nibbles(self.integers().contiguous().unflatten(1, (-1, GROUP)))
        self.kernel_tokens = 64

    def integers(self) -> Tensor:
        """The integers, (D_out, D_in) uint8 within 0..15. The kernel reads its own layout, which CPUs differ in."""
        if self.nibbles is not None:
            return _integers(self.nibbles)
        units = torch.ones_like(self.scale_and_zero)
        units[..., 1] = 8
        identity = torch.eye(self.in_features, dtype=units.dtype)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, self.packed, GROUP, units)
        return product.t().to(torch.uint8)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_and_zero.dtype

    def dequantized(self) -> Tensor:
        scale, zero = self.scale_and_zero.unbind(-1)
        centered = self.integers().to(scale.dtype).unflatten(1, (-1, GROUP)) - 8
        return (centered * scale.t()[..., None] + zero.t()[..., None]).flatten(1)

    def kernel(self, x_TD: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TD, self.packed, GROUP, self.scale_and_zero)

    @property
    def has_kernel(self) -> bool:
        return self.packed is not None


class Int4:
    """Linears of the blocks in int4 where their input divides into groups, the rest and the head in int8."""

    name = "int4"

    def supports(self, device: str) -> list[str]:
        """The CPU, whose kernel and layout it uses."""
        return [] if device == "cpu" else [f"int4 runs on the cpu, not on {device}"]

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        """int8 for the head: its error reaches the logits as it is."""
        return Int8Linear if role == "head" or d_in % GROUP else Int4Linear


def _nibbles(groups: Tensor) -> Tensor:
    """Two integers a byte, from (D_out, G, 32)."""
    low, high = groups.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def _integers(nibbles: Tensor) -> Tensor:
    """The inverse of `_nibbles`, (D_out, D_in)."""
    halves = nibbles.unflatten(1, (-1, GROUP // 2))
    return torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)


def _pack(nibbles: Tensor) -> Tensor:
    """The kernel's own layout, two integers a byte, block by block: its input has eight times that size."""
    packed = torch.empty_like(nibbles)
    for source, target in zip(nibbles.split(_ROWS), packed.split(_ROWS), strict=True):
        target.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(_integers(source).int(), 1))
    return packed
