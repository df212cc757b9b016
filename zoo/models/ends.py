"""Where tokens come in and logits go out. Shape letters: B batch, T tokens, D model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.spec import ModelSpec


class ScaledEmbedding(nn.Embedding):
    """An embedding times a constant (Gemma: the square root of the width)."""

    def __init__(self, spec: ModelSpec, scale: float) -> None:
        super().__init__(spec.vocab_size, spec.d_model)
        self.scale = scale

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Returns (B, T, D). The constant is rounded to the dtype of the weights, as in the reference."""
        x_BTD = super().forward(tokens_BT)
        return x_BTD * torch.tensor(self.scale, dtype=x_BTD.dtype, device=x_BTD.device)


class SoftCap(nn.Module):
    """cap * tanh(x / cap): logits stay within the cap (Gemma 2)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits_BTV: Tensor) -> Tensor:
        """Returns (B, T, V)."""
        return self.cap * torch.tanh(logits_BTV / self.cap)


def build_embedding(spec: ModelSpec) -> nn.Embedding:
    """The token embedding of a spec."""
    if spec.embed_scale is None:
        return nn.Embedding(spec.vocab_size, spec.d_model)
    return ScaledEmbedding(spec, spec.embed_scale)
