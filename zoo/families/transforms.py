"""How one stored tensor becomes one or several of ours, and back. Every transform is a bijection on values.

Shape letters: D input width, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zoo.spec import ModelSpec

Shape = tuple[int, ...]


class Transform(Protocol):
    """A stored tensor <-> our tensors, whose shapes are given."""

    moves_rows: bool
    """Whether rows stay whole: tensors that have a row for each row of a weight (scales) can be split alike."""

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        """Ours from the stored one; views where possible."""

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        """The stored one from ours."""

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        """Shape of the stored tensor."""


class Same:
    """Stored as it is."""

    moves_rows = True

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        return [stored]

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        return ours[0]

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        return shapes[0]


class Rows:
    """Several linears stacked along the output dimension: rows of q, then of k, then of v."""

    moves_rows = True

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        return list(stored.split([shape[0] for shape in shapes]))

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        return torch.cat(list(ours))

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


class Stacked:
    """Tensors of one shape along a new first dimension."""

    moves_rows = False

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        return list(stored.unbind())

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        return torch.stack(list(ours))

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        return (len(shapes), *shapes[0])


class Transposed(Rows):
    """As `Rows`, but each weight is stored (in, out), as GPT-2's Conv1D does. One linear or several; biases too."""

    moves_rows = False

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        return super().split(stored.t(), shapes, spec)

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        return super().merge(ours, spec).t()

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        return super().stored_shape(shapes, spec)[::-1]


class HeadInterleaved:
    """Kv head after kv head: the queries that share it, its key, its value; rows (K, N / K + 2, H).

    With as many kv heads as heads that is q, k, v of each head (GPT-NeoX), with one it is all of q, then k, then v.
    """

    moves_rows = True

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        by_kv_head = stored.view(spec.n_kv_heads, -1, spec.d_head, *stored.shape[1:])
        parts = by_kv_head.split([spec.n_heads // spec.n_kv_heads, 1, 1], dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        parts = [part.reshape(spec.n_kv_heads, -1, spec.d_head, *part.shape[1:]) for part in ours]
        return torch.cat(parts, dim=1).reshape(-1, *ours[0].shape[1:])

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


class RopePaired:
    """Rows of each head reordered so that rotary pairs are neighbours, as llama.cpp stores Llama's q and k.

    Hugging Face keeps the two halves of a pair H/2 rows apart; row 2i of a stored head is row i of ours and row
    2i + 1 is row H/2 + i (llama.cpp, ``LlamaModel.permute`` in convert_hf_to_gguf.py).
    """

    moves_rows = True

    def split(self, stored: Tensor, shapes: Sequence[Shape], spec: ModelSpec) -> list[Tensor]:
        paired = stored.view(-1, spec.d_head // 2, 2, *stored.shape[1:])
        return [paired.transpose(1, 2).reshape(stored.shape)]

    def merge(self, ours: Sequence[Tensor], spec: ModelSpec) -> Tensor:
        halves = ours[0].reshape(-1, 2, spec.d_head // 2, *ours[0].shape[1:])
        return halves.transpose(1, 2).reshape(ours[0].shape)

    def stored_shape(self, shapes: Sequence[Shape], spec: ModelSpec) -> Shape:
        return shapes[0]


TRANSFORMS: dict[str, Transform] = {
    "same": Same(),
    "rows": Rows(),
    "stacked": Stacked(),
    "transposed": Transposed(),
    "head_interleaved": HeadInterleaved(),
    "rope_paired": RopePaired(),
}
"""By the word that a key map uses for them."""
