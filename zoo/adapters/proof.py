"""Proof that what is to be trained learns: that moving it would move the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.adapters.attach import AttachedAdapter

SILENT = 1e-6
"""A gradient is none if its norm is at most this part of the median of all."""


def randomize(handle: AttachedAdapter, seed: int = 0) -> None:
    """Put noise on every trainable parameter, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def without_gradient(handle: AttachedAdapter, loss: Callable[[], Tensor], *, seed: int = 0) -> list[str]:
    """Names of trainable parameters that the loss does not depend on. Runs one backward pass.

    What starts at zero hides what it is multiplied with, so there is noise on every parameter meanwhile; all values
    are restored to the bit, and no gradients are left.

    Args:
        loss: computes a scalar from the model, the same at each call.
        seed: of the noise.
    """
    trainable = handle.trainable()
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    try:
        randomize(handle, seed)
        handle.root.zero_grad(set_to_none=True)
        loss().backward()
        norms = {n: 0.0 if p.grad is None else float(p.grad.float().norm()) for n, p in trainable.items()}
    finally:
        handle.root.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(before[name])
    median = sorted(norms.values())[len(norms) // 2]
    return [name for name, norm in norms.items() if norm <= SILENT * median]
