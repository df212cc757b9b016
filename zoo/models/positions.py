"""How a model knows where a token stands: a learned table added to the embedding, or rotations of q and k.

Shape letters: B batch, T tokens, D model width, N heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from zoo.models.rope import Rotation, rotate_halves, rotate_pairs, rotation_at
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

    def __init__(self, rope: RopeSpec) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Rotation | None]:
        """The embeddings as they are, and the rotation for their positions in their dtype."""
        return x_BTD, rotation_at(self.rope, positions_BT, x_BTD.dtype)


def build_positions(spec: ModelSpec) -> LearnedPositions | RotaryPositions:
    """The position scheme of a spec."""
    return LearnedPositions(spec) if spec.rope is None else RotaryPositions(spec.rope)


def build_rotate(spec: ModelSpec, layer: int) -> Rotate:
    """How an attention layer of this spec turns its q and k."""
    if spec.rope is None or layer in spec.unrotated_layers:
        return lambda x_BTNH, rotation: x_BTNH
    rotate = rotate_pairs if spec.rope.interleaved else rotate_halves

    def turn(x_BTNH: Tensor, rotation: Rotation | None) -> Tensor:
        assert rotation is not None
        return rotate(x_BTNH, rotation)

    return turn
