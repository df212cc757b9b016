"""Numbers as FP8 holds them, with factors that bring a tensor into FP8's range (arXiv 2209.05433, OCP MX 1.0).

Shape letters: T tokens, D_in, D_out of a linear; R rows, C columns of any matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo_transformer_engine.options import BLOCK, E4M3_MAX, E5M2_MAX

_MAX = {torch.float8_e4m3fn: E4M3_MAX, torch.float8_e5m2: E5M2_MAX}


class Quantized(NamedTuple):
    """A matrix in FP8: one byte per number, and what they are to be multiplied with."""

    values: Tensor
    """(R, C), or blocks of rows (R', BLOCK, C), the last of them filled up."""
    inverse: Tensor
    """float32, which broadcasts against ``values``."""
    rows: int
    """R."""
    transposed: bool = False
    """Whether what it stands for is its transpose, (C, R)."""

    def dequantized(self) -> Tensor:
        """The matrix that it stands for, float32."""
        x = self.values.float() * self.inverse
        x_RC = x.flatten(0, 1)[: self.rows] if x.dim() == 3 else x
        return x_RC.t() if self.transposed else x_RC


def largest(dtype: torch.dtype) -> float:
    """The largest number of an FP8 dtype."""
    return _MAX[dtype]


def factor(amax: Tensor, dtype: torch.dtype, before: Tensor | float = 1.0, margin: int = 0) -> Tensor:
    """What brings ``amax`` to the largest number of ``dtype``, ``margin`` powers of two below; float32.

    ``before`` stays where the amax says nothing: it is zero, or no finite number.
    """
    scale = (largest(dtype) / amax) / 2**margin
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    known = (amax > 0) & torch.isfinite(amax)
    return torch.where(known, scale, before)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """A float32 matrix times a factor in FP8; what is beyond its range becomes its largest number, as on a GPU."""
    limit = largest(dtype)
    return Quantized((x * scale).clamp_(-limit, limit).to(dtype), scale.reciprocal(), x.shape[0])


def quantize_blocks(x_RC: Tensor, dtype: torch.dtype) -> Quantized:
    """MXFP8 along the rows: each 32 numbers of a column share a power of two that leaves none beyond the range."""
    rows = x_RC.shape[0]
    blocks = F.pad(x_RC, (0, 0, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
    ratio = blocks.abs().amax(dim=1, keepdim=True) / largest(dtype)
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)  # of the next power of two
    scale = torch.where(ratio > 0, torch.ldexp(torch.ones_like(ratio), -exponent), 1.0)
    return quantize(blocks, scale, dtype)._replace(rows=rows)
