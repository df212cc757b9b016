"""Multi-head attention with grouped kv heads; what happens between q, k, v and the result is the backend's.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor, nn

from zoo.models.cache import Cache
from zoo.models.joint import apply_linears, join
from zoo.models.masks import Mask
from zoo.models.norm import build_qk_norm
from zoo.models.positions import build_rotate
from zoo.models.rope import Rotation
from zoo.spec import ModelSpec, RopeSpec


class Attend(Protocol):
    """What the model asks of an attention backend."""

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        *,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention of the last T of S tokens, (B, T, N, H) in q's dtype. A row that sees no key is zero."""


class AppendAndAttend(Protocol):
    """What a backend may have besides, by the name ``append_and_attend``: a step of decoding as one kernel."""

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        rotation: Rotation | None,
        rope: RopeSpec | None,
        cache: Cache,
        layer: int,
        mask: Mask,
        scale: float,
        softcap: float | None,
    ) -> Tensor | None:
        """Rotates q and k, stores k and v, attends: (B, T, N, H). None, with nothing done, where it can not do all."""


class Attention(nn.Module):
    """Self-attention of one layer. ``q``, ``k`` and ``v`` are linears of their own, so adapters need no layout."""

    def __init__(self, spec: ModelSpec, layer: int, attend: Attend) -> None:
        super().__init__()
        q_width, kv_width = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
        self.q = nn.Linear(spec.d_model, q_width, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.d_model, kv_width, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.d_model, kv_width, bias=spec.qkv_bias)
        self.out = nn.Linear(q_width, spec.d_model, bias=spec.attn_out_bias)
        self.attend = attend
        self.layer = layer
        self.d_head = spec.d_head
        self.dropout_p = spec.attn_dropout
        self.scale = attention_scale(spec, layer)
        self.softcap = spec.attn_softcap
        self.clip = float("inf") if spec.qkv_clip is None else spec.qkv_clip
        self.window = None if layer in spec.full_attention_layers else spec.window
        self.q_norm = build_qk_norm(spec, spec.n_heads)
        self.k_norm = build_qk_norm(spec, spec.n_kv_heads)
        self.rotate = build_rotate(spec, layer)
        self.rope = None if layer in spec.unrotated_layers else spec.rope

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """Returns (B, T, D)."""
        q_BTNH, k_BSKH, v_BSKH = map(self._heads, apply_linears(x_BTD, self.q, self.k, self.v))
        q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        if cache is not None:
            y_BTNH = self._in_one_kernel(q_BTNH, k_BSKH, v_BSKH, rotation, mask, cache)
            if y_BTNH is not None:
                return self.out(y_BTNH.flatten(-2))
        q_BTNH, k_BSKH = self.rotate(q_BTNH, rotation), self.rotate(k_BSKH, rotation)
        if cache is not None:
            k_BSKH, v_BSKH = cache.append(self.layer, k_BSKH, v_BSKH)
        return self.out(self.attended(q_BTNH, k_BSKH, v_BSKH, mask).flatten(-2))

    def _in_one_kernel(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache
    ) -> Tensor | None:
        """What a backend makes of all that is left to do, if it can."""
        step: AppendAndAttend | None = getattr(self.attend, "append_and_attend", None)
        if step is None or self.training:
            return None
        return step(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            rotation=rotation,
            rope=self.rope,
            cache=cache,
            layer=self.layer,
            mask=mask.narrowed(self.window),
            scale=self.scale,
            softcap=self.softcap,
        )

    def attended(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask) -> Tensor:
        """What the backend makes of queries, keys and values, (B, T, N, H)."""
        attend = partial(
            self.attend,
            mask=mask.of_row().narrowed(self.window),
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        qkv = (q_BTNH, k_BSKH, v_BSKH)
        return attend(*qkv) if mask.rows is None else mask.rows.attend(attend, *qkv)

    def join(self) -> None:
        """Lay the weights of q, k and v side by side: see `zoo.models.joint`."""
        join(self.q, self.k, self.v)

    def queries(self, x_BTD: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries (B, T, N, H), rotated, as `forward` makes them."""
        q_BTNH: Tensor = self.rotate(self.q_norm(self._heads(self.q(x_BTD))), rotation)
        return q_BTNH

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, before they are rotated, and values (..., K, H) of hidden states (..., D)."""
        return self.k_norm(self._heads(self.k(x))), self._heads(self.v(x))

    def _heads(self, x: Tensor) -> Tensor:
        clipped = x.clamp(-self.clip, self.clip) if self.clip < float("inf") else x
        return clipped.unflatten(-1, (-1, self.d_head))


def attention_scale(spec: ModelSpec, layer: int) -> float:
    """The factor on the scores of a layer (counted from 0)."""
    scale = spec.d_head**-0.5 if spec.attn_scale is None else spec.attn_scale
    return scale / (layer + 1) if spec.attn_scale_by_layer else scale
