"""One layer of the decoder: attention and feed-forward around a residual stream, wired in one of three ways."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.models.attention import Attend, Attention
from zoo.models.cache import Cache
from zoo.models.masks import Mask
from zoo.models.mlp import build_mlp
from zoo.models.norm import build_norm
from zoo.models.rope import Rotation
from zoo.spec import ModelSpec


class SequentialBlock(nn.Module):
    """Feed-forward sees what attention has added; norms before (GPT-2, Llama), after (OLMo 2) or both (Gemma 2)."""

    def __init__(self, spec: ModelSpec, layer: int, attend: Attend) -> None:
        super().__init__()
        before, after = spec.norm_place != "after", spec.norm_place != "before"
        self.attn_norm = build_norm(spec) if before else nn.Identity()
        self.attn = Attention(spec, layer, attend)
        self.attn_post_norm = build_norm(spec) if after else nn.Identity()
        self.mlp_norm = build_norm(spec) if before else nn.Identity()
        self.mlp = build_mlp(spec)
        self.mlp_post_norm = build_norm(spec) if after else nn.Identity()
        self.dropout = nn.Dropout(spec.resid_dropout)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """Returns (B, T, D)."""
        attn_BTD = self.attn(self.attn_norm(x_BTD), rotation, mask, cache)
        x_BTD = x_BTD + self.dropout(self.attn_post_norm(attn_BTD))
        return x_BTD + self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x_BTD))))


class ParallelBlock(nn.Module):
    """Both see the same input, each through a norm of its own (GPT-NeoX)."""

    def __init__(self, spec: ModelSpec, layer: int, attend: Attend) -> None:
        super().__init__()
        self.attn_norm = build_norm(spec)
        self.attn = Attention(spec, layer, attend)
        self.mlp_norm = build_norm(spec)
        self.mlp = build_mlp(spec)
        self.dropout = nn.Dropout(spec.resid_dropout)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """Returns (B, T, D)."""
        attn_BTD = self.dropout(self.attn(self.attn_norm(x_BTD), rotation, mask, cache))
        return x_BTD + attn_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class SharedNormBlock(nn.Module):
    """Both see the same normalized input (GPT-J)."""

    def __init__(self, spec: ModelSpec, layer: int, attend: Attend) -> None:
        super().__init__()
        self.attn_norm = build_norm(spec)
        self.attn = Attention(spec, layer, attend)
        self.mlp = build_mlp(spec)
        self.dropout = nn.Dropout(spec.resid_dropout)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """Returns (B, T, D)."""
        normed_BTD = self.attn_norm(x_BTD)
        attn_BTD = self.dropout(self.attn(normed_BTD, rotation, mask, cache))
        return x_BTD + attn_BTD + self.dropout(self.mlp(normed_BTD))


BLOCKS = {"sequential": SequentialBlock, "parallel": ParallelBlock, "parallel_shared_norm": SharedNormBlock}
