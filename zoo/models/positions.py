"""How a model knows where a token stands: a learned table added to the embedding, or rotations of q and k.

Shape letters: B batch, T tokens, D model width, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.models.rope import Rotation, rotation_at, swap_halves, swap_pairs
from zoo.spec import ModelSpec, RopeSpec

Rotate = Callable[[Tensor, "Rotation | None"], Tensor]


class LearnedPositions(nn.Embedding):
    """One learned vector per position (GPT-2)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.max_seq_len, spec.d_model)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Rotation | None]:  # type: ignore[override]
        """The embeddings with their position's vector added; nothing to rotate."""
        return x_BTD + super().forward(positions_BT), None


class RotaryPositions(nn.Module):
    """Leaves the embeddings alone and hands every layer the same rotation. Computed anew, so no cast can harm it."""

    def __init__(self, rope: RopeSpec, d_head: int) -> None:
        super().__init__()
        self.rope, self.d_head = rope, d_head

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Rotation | None]:
        """The embeddings as they are, and the rotation for their positions in their dtype."""
        return x_BTD, rotation_at(self.rope, positions_BT, self.d_head, x_BTD.dtype)


def build_positions(spec: ModelSpec) -> LearnedPositions | RotaryPositions:
    """The position scheme of a spec."""
    return LearnedPositions(spec) if spec.rope is None else RotaryPositions(spec.rope, spec.d_head)


def build_rotate(spec: ModelSpec, layer: int) -> Rotate:
    """How an attention layer of this spec turns its q and k."""
    if spec.rope is None or layer in spec.unrotated_layers:
        return lambda x_BTNH, rotation: x_BTNH
    swap = swap_pairs if spec.rope.interleaved else swap_halves
    n_dims = spec.rope.n_dims

    def turn(x_BTNH: Tensor, rotation: Rotation | None) -> Tensor:
        assert rotation is not None
        cos, sin = rotation
        return torch.addcmul(x_BTNH * cos, swap(x_BTNH, n_dims), sin)

    return turn
