"""Attention to keys that stay in their cache: ``flash_attn_with_kvcache``. No gradients, no dropout.

Shape letters: B batch, T query tokens, S key/value tokens (room for later ones included), N query heads, K kv heads,
H head size, R rotary dimensions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from zoo.models.masks import Mask
from zoo.models.rope import Rotation
from zoo.spec import RopeSpec
from zoo_flash_attn.install import kernels_for

_ROTARY_STEP = 16
"""The kernel rotates multiples of so many dimensions."""


def window_of(mask: Mask, n_keys: int) -> tuple[int, int]:
    """How many keys before and after its own a query sees, -1 for all.

    Both are -1 where a window hides nothing: the kernels then share keys among the heads of a single query. With room
    behind the queries nothing is left out, since compiled decoding goes on with what it was told for a short context.
    """
    if mask.window is None or (mask.queries_T is None and mask.window >= n_keys):
        return -1, -1
    return mask.window - 1, 0 if mask.causal else -1


def attend_in_cache(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask, scale: float, softcap: float | None
) -> Tensor:
    """Attention with padding before the keys, room behind them, or both; a padded query sees nothing and is zero.

    Raises:
        ValueError: the queries are not at consecutive places.
    """
    n_keys = k_BSKH.shape[1]
    ends_B = _ends(mask, q_BTNH, n_keys)
    padding_B = None if mask.padding_B is None else mask.padding_B.to(torch.int32).minimum(ends_B)
    options = (scale, mask.causal, *window_of(mask, n_keys), softcap or 0.0)
    call = torch.ops.zoo_flash_attn.attend_in_cache if torch.compiler.is_compiling() else _attend
    out: Tensor = call(q_BTNH, k_BSKH, v_BSKH, ends_B, padding_B, *options)
    return out


def _ends(mask: Mask, q_BTNH: Tensor, n_keys: int) -> Tensor:
    """How many keys there are for each row up to its last query, int32."""
    batch, n_queries = q_BTNH.shape[:2]
    positions_T = mask.queries_T
    if positions_T is None:
        return _filled(n_keys, batch, q_BTNH.device)
    # A single query is all that decoding has; to look at more costs a wait for the GPU.
    if n_queries > 1 and not bool((positions_T.diff() == 1).all()):
        raise ValueError("FlashAttention takes queries at consecutive places alone")
    return (positions_T[-1:] + 1).to(torch.int32).expand(batch).contiguous()


def store_and_attend(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    keys_BSKH: Tensor,
    values_BSKH: Tensor,
    n_held: int,
    rotation: Rotation | None,
    rope: RopeSpec | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Rotate q and k, write k and v after the ``n_held`` tokens of the cache, attend: one kernel. Causal."""
    batch, n_queries = q_BTNH.shape[:2]
    cos_SR, sin_SR = None, None
    if rotation is not None and rope is not None:
        cos_SR, sin_SR = _rotary_tables(*rotation, rope, keys_BSKH.shape[1], n_held)
    out: Tensor = kernels_for(q_BTNH).cached(
        q_BTNH,
        keys_BSKH,
        values_BSKH,
        k=k_BTKH,
        v=v_BTKH,
        rotary_cos=cos_SR,
        rotary_sin=sin_SR,
        rotary_interleaved=rope is not None and rope.interleaved,
        cache_seqlens=_filled(n_held, batch, q_BTNH.device),
        softmax_scale=scale,
        causal=True,
        window_size=window_of(mask, n_held + n_queries),
        softcap=softcap or 0.0,
    )
    return out


def rotates_inside(rotation: Rotation | None, rope: RopeSpec | None) -> bool:
    """Whether the kernel can rotate like this: all rows alike, in steps of its own; or nothing is to be rotated."""
    if rotation is None or rope is None:
        return True
    return rotation[0].shape[0] == 1 and rope.n_dims % _ROTARY_STEP == 0


@lru_cache(maxsize=2)  # every layer of a step asks for the same ones; tensors are looked up by identity
def _rotary_tables(
    cos_1T1H: Tensor, sin_1T1H: Tensor, rope: RopeSpec, n_rows: int, start: int
) -> tuple[Tensor, Tensor]:
    """The rotation as the kernel takes it, (S, R/2): a row for every place of the cache, those from ``start`` filled.

    It holds whatever the positions are, stretched or not, since the kernel looks it up by the place in the cache.
    """
    half = rope.n_dims // 2
    if rope.interleaved:
        first, second = slice(0, rope.n_dims, 2), slice(1, rope.n_dims, 2)
    else:
        first, second = slice(0, half), slice(half, rope.n_dims)
    tables = []
    for rows_T in (cos_1T1H[0, :, 0, first], sin_1T1H[0, :, 0, second]):  # zoo's sine of the first is negative
        table = rows_T.new_zeros(n_rows, half)
        table[start : start + len(rows_T)] = rows_T
        tables.append(table)
    return tables[0], tables[1]


@lru_cache(maxsize=4)  # of all layers of a step
def _filled(length: int, batch: int, device: torch.device) -> Tensor:
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def _attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    ends_B: Tensor,
    padding_B: Tensor | None,
    scale: float,
    causal: bool,
    before: int,
    after: int,
    softcap: float,
) -> Tensor:
    out: Tensor = kernels_for(q_BTNH).cached(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        cache_seqlens=ends_B,
        cache_leftpad=padding_B,
        softmax_scale=scale,
        causal=causal,
        window_size=(before, after),
        softcap=softcap,
    )
    return out


_OP = torch.library.custom_op(
    "zoo_flash_attn::attend_in_cache",
    _attend,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor ends, Tensor? padding, float scale, bool causal, int before, "
    "int after, float softcap) -> Tensor",
)
"""For a compiler, which can not look into FlashAttention's own function."""


@_OP.register_fake
def _shape_of_result(q_BTNH: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q_BTNH)
