"""Linears of one input as one product, where their weights lie one after the other in memory.

A wide product comes nearer to a processor's peak than narrow ones, and is one call. Nothing else knows of it: each
linear keeps its own weight, as a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def apply_linears(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """What each linear makes of x (..., D_in), without a gradient in one product if they are `joined`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or (weight := _joined(linears)) is None:
        return [linear(x) for linear in linears]
    biases = [linear.bias for linear in linears if isinstance(linear.bias, Tensor)]
    y = F.linear(x, weight, torch.cat(biases) if biases else None)
    return y.split([linear.get_parameter("weight").shape[0] for linear in linears], dim=-1)


def join(*linears: nn.Module) -> None:
    """Move the weights of these linears into one tensor; those that are no plain linears of one dtype stay."""
    if not _alike(linears):
        return
    weights = [linear.get_parameter("weight") for linear in linears]
    parts = torch.cat([weight.data for weight in weights]).split([weight.shape[0] for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part


def _joined(linears: Sequence[nn.Module]) -> Tensor | None:
    """Their weights as one (D_out in all, D_in), if they are rows of one tensor in this order."""
    if not _alike(linears):
        return None
    weights = [linear.get_parameter("weight") for linear in linears]
    first, storage = weights[0], weights[0].untyped_storage().data_ptr()
    for before, after in pairwise(weights):
        if after.data_ptr() != before.data_ptr() + before.nbytes or after.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), (first.shape[1], 1))


def _alike(linears: Sequence[nn.Module]) -> bool:
    if any(type(linear) is not nn.Linear for linear in linears):  # a subclass may compute something else
        return False
    weights = [linear.get_parameter("weight") for linear in linears]
    kinds = {(weight.shape[1], weight.dtype, weight.device, weight.is_contiguous()) for weight in weights}
    return len(kinds) == 1 and weights[0].is_contiguous() and len({linear.bias is None for linear in linears}) == 1
