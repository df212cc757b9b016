"""Rotary position embedding (arXiv 2104.09864) and its stretched variants.

Shape letters: B batch, T tokens, N heads, H head size, R rotary dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.spec import ModelSpec, RopeScaling, RopeSpec

Rotation = tuple[Tensor, Tensor]
"""cos_BT1H and sin_BT1H, the same for every head: a head x becomes x * cos + swapped x * sin.

So sin is negative where a pair's first dimension is; dimensions that do not rotate have a cosine of one.
"""


def rotary_frequencies(rope: RopeSpec, device: torch.device) -> Tensor:
    """Radians per position for each of the R/2 pairs, float32, without scaling."""
    exponents = torch.arange(0, rope.n_dims, 2, device=device, dtype=torch.float32) / rope.n_dims
    return 1.0 / (rope.base**exponents)


def rotation_at(rope: RopeSpec, positions_BT: Tensor, d_head: int, dtype: torch.dtype) -> Rotation:
    """The rotation for integer positions. Angles are float32: bfloat16 positions would be off by radians."""
    frequencies, amplitude = rotary_frequencies(rope, positions_BT.device), 1.0
    if rope.scaling is not None:
        frequencies, amplitude = _SCALINGS[rope.scaling.kind](frequencies, rope.scaling, positions_BT)
    angles_BT1r = positions_BT[..., None, None].float() * frequencies
    cos, sin = angles_BT1r.cos() * amplitude, angles_BT1r.sin() * amplitude
    join = _as_pairs if rope.interleaved else _as_halves
    n_rest = d_head - rope.n_dims
    cos_BT1H, sin_BT1H = F.pad(join(cos, cos), (0, n_rest), value=1.0), F.pad(join(-sin, sin), (0, n_rest))
    return cos_BT1H.to(dtype), sin_BT1H.to(dtype)


def _as_halves(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((first, second), dim=-1)


def _as_pairs(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), dim=-1).flatten(-2)


def rotation_border(spec: ModelSpec) -> int | None:
    """The length beyond which a sequence is rotated by other angles, from its first token on (LongRoPE)."""
    scaling = spec.rope.scaling if spec.rope is not None else None
    return scaling.original_max_seq_len if scaling is not None and scaling.kind == "longrope" else None


def swap_halves(x: Tensor, n_dims: int) -> Tensor:
    """Puts dimension i in the place of i + R/2 and the other way round, R = ``n_dims``; those from R on stay."""
    first, second, rest = x.tensor_split((n_dims // 2, n_dims), dim=-1)
    return torch.cat((second, first, rest), dim=-1)


def swap_pairs(x: Tensor, n_dims: int) -> Tensor:
    """Puts dimension 2i in the place of 2i + 1 and the other way round; those from ``n_dims`` on stay."""
    pairs, rest = x.tensor_split((n_dims,), dim=-1)
    return torch.cat((pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), rest), dim=-1)


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
