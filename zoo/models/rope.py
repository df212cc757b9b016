"""Rotary position embedding (arXiv 2104.09864) and its stretched variants.

Shape letters: B batch, T tokens, N heads, H head size, R rotary dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.spec import ModelSpec, RopeScaling, RopeSpec

Rotation = tuple[Tensor, Tensor]
"""cos_BT1r and sin_BT1r, r = R/2: one angle per rotated pair, the same for every head."""


def rotary_frequencies(rope: RopeSpec, device: torch.device) -> Tensor:
    """Radians per position for each of the R/2 pairs, float32, without scaling."""
    exponents = torch.arange(0, rope.n_dims, 2, device=device, dtype=torch.float32) / rope.n_dims
    return 1.0 / (rope.base**exponents)


def rotation_at(rope: RopeSpec, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for integer positions. Angles are float32: bfloat16 positions would be off by radians."""
    frequencies, amplitude = rotary_frequencies(rope, positions_BT.device), 1.0
    if rope.scaling is not None:
        frequencies, amplitude = _SCALINGS[rope.scaling.kind](frequencies, rope.scaling, positions_BT)
    angles_BT1r = positions_BT[..., None, None].float() * frequencies
    return (angles_BT1r.cos() * amplitude).to(dtype), (angles_BT1r.sin() * amplitude).to(dtype)


def rotation_border(spec: ModelSpec) -> int | None:
    """The length beyond which a sequence is rotated by other angles, from its first token on (LongRoPE)."""
    scaling = spec.rope.scaling if spec.rope is not None else None
    return scaling.original_max_seq_len if scaling is not None and scaling.kind == "longrope" else None


def rotate_halves(x_BTNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate dimension i with dimension i + R/2; dimensions from R on pass through."""
    cos, sin = rotation
    r = cos.shape[-1]
    first, second, rest = x_BTNH[..., :r], x_BTNH[..., r : 2 * r], x_BTNH[..., 2 * r :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotate_pairs(x_BTNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate dimension 2i with dimension 2i + 1; dimensions from R on pass through."""
    cos, sin = rotation
    r = cos.shape[-1]
    even, odd, rest = x_BTNH[..., 0 : 2 * r : 2], x_BTNH[..., 1 : 2 * r : 2], x_BTNH[..., 2 * r :]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, rest), dim=-1)


def _linear(frequencies: Tensor, scaling: RopeScaling, positions_BT: Tensor) -> tuple[Tensor, float]:
    return frequencies / scaling.factor, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling, positions_BT: Tensor) -> tuple[Tensor, float]:
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths  # rotations within the context that was trained on
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * frequencies / scaling.factor + blend * frequencies, 1.0


def _longrope(frequencies: Tensor, scaling: RopeScaling, positions_BT: Tensor) -> tuple[Tensor, float]:
    short, long = (frequencies / frequencies.new_tensor(f) for f in (scaling.short_factors, scaling.long_factors))
    # A tensor decides: reading the length back would stall a GPU and break a compiled graph.
    is_long = positions_BT.max() >= scaling.original_max_seq_len
    return torch.where(is_long, long, short), scaling.attn_factor


_SCALINGS = {"linear": _linear, "llama3": _llama3, "longrope": _longrope}
