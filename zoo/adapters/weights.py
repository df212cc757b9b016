"""The weight of a linear, convolution or embedding, whichever way a module holds it: outputs first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores (D_in, D_out): transformers' ``Conv1D``, known by its class so as not to import it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear holds integers, and offers ``dequantized()`` instead of a weight."""
    return hasattr(module, "dequantized")


def weight_of(module: nn.Module) -> Tensor:
    """The weight, outputs first, float32; that of a quantized linear is dequantized."""
    holder: Any = module
    if is_quantized(module):
        dequantized: Tensor = holder.dequantized().float()
        return dequantized
    weight: Tensor = holder.weight.detach().float()
    return weight.T if is_transposed(module) else weight


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """The shape of `weight_of`."""
    holder: Any = module
    if is_quantized(module):
        return (holder.out_features, holder.in_features)
    shape = tuple(holder.weight.shape)
    return shape[::-1] if is_transposed(module) else shape


def device_of(module: nn.Module) -> torch.device:
    """Where the weight is."""
    return next(t.device for t in (*module.parameters(), *module.buffers()))
