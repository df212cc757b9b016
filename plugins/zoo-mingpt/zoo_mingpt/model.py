"""A GPT in the manner of minGPT, as somebody may have written it who never heard of zoo.

But for `Attention.attention_site`, which LLaMA-Adapter needs, nothing here is there for zoo's sake.

Shape letters: B batch, T tokens, N heads, H head size, D model width, V vocabulary, P prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.project = nn.Linear(d_model, d_model)
        self.n_heads, self.dropout = n_heads, dropout
        self.prompts: nn.Module | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        q_BTNH, k_BTNH, v_BTNH = self._heads(x_BTD)
        y_BNTH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BTNH.transpose(1, 2),
            v_BTNH.transpose(1, 2),
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y_BTNH = y_BNTH.transpose(1, 2)
        if self.prompts is not None:
            y_BTNH = self.prompts(q_BTNH, y_BTNH)
        y_BTD: Tensor = self.project(y_BTNH.flatten(2))
        return y_BTD

    def attention_site(self) -> PromptSite:
        """How zoo's prompts enter this layer."""
        return PromptSite(self)

    def _heads(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (self.n_heads, -1)) for part in self.qkv(x).chunk(3, dim=-1)]


class PromptSite:
    """The interface of `zoo.adapters.base.AttentionSite` for one layer."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self.width = attention.qkv.in_features
        self.n_heads = self.n_kv_heads = attention.n_heads
        self.scale = (self.width / self.n_heads) ** -0.5
        self.device = attention.qkv.weight.device

    def prompt_kv(self, prompt_PD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, N, H) of prompts."""
        _, k_PNH, v_PNH = self._attention._heads(prompt_PD)
        return k_PNH, v_PNH

    def install(self, prompts: nn.Module) -> None:
        """Have the layer ask ``prompts`` for its result."""
        self._attention.prompts = prompts


class FeedForward(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(d_model, 4 * d_model)
        self.narrow = nn.Linear(4 * d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        return self.dropout(self.narrow(F.gelu(self.widen(x_BTD))))


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalized residual stream."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_heads, dropout)
        self.norm_2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_1(x_BTD)))
        return x_BTD + self.feed_forward(self.norm_2(x_BTD))


class MinGPT(nn.Module):
    """The whole model: learned positions, pre-norm layers, a head of its own."""

    def __init__(
        self, *, n_layers: int, n_heads: int, d_model: int, vocab_size: int, max_seq_len: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(max_seq_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(d_model, n_heads, dropout) for _ in range(n_layers))
        self.last_norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("project.weight", "narrow.weight")):  # what adds up in the residual stream starts smaller
                nn.init.normal_(parameter, std=0.02 / (2 * n_layers) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V), and the loss if there are targets; those of -1 do not count."""
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.dropout(self.tokens(ids_BT) + self.places(places_T))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits_BTV = self.head(self.last_norm(x_BTD))
        if targets_BT is None:
            return logits_BTV, None
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1)
