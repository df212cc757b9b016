"""torch's fused scaled-dot-product attention.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attention.base import AttentionRequest
from zoo.attention.products import attend_causally, can_attend
from zoo.models.masks import Mask

_BLOCK = 64
"""Queries at a time of a prompt on a CPU: each block computes no scores beyond its own end."""


class SDPA:
    """`torch.nn.functional.scaled_dot_product_attention`: any device, dtype and mask."""

    def supports(self, request: AttentionRequest) -> list[str]:
        """Everything but soft-capped scores."""
        return ["torch's SDPA can not soft-cap scores"] if request.softcap else []

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
        """Builds a dense mask only where neither ``is_causal`` nor no mask at all says the same.

        Raises `ValueError` for a soft cap, which it can not do.
        """
        if softcap is not None:
            raise ValueError("torch's SDPA can not soft-cap scores")
        n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
        causal_alone = mask.causal and mask.is_plain(n_keys)
        is_eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if q_BTNH.device.type == "cpu" and n_queries > _BLOCK and causal_alone and is_eager:
            return _attend_in_blocks(q_BTNH, k_BSKH, v_BSKH, scale, dropout_p)
        if causal_alone and dropout_p == 0 and can_attend(q_BTNH, k_BSKH):
            return attend_causally(q_BTNH, k_BSKH, v_BSKH, scale)
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask, scale, dropout_p)


def _attend_in_blocks(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, scale: float, dropout_p: float) -> Tensor:
    n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    longest = max(1024, 1 << (n_keys - 1).bit_length())
    mask_bS = _causal_band(longest, q_BTNH.dtype)
    blocks = []
    for start in range(0, n_queries, _BLOCK):
        q_BbNH = q_BTNH[:, start : start + _BLOCK]
        n_rows, n_before = q_BbNH.shape[1], n_keys - n_queries + start
        seen = slice(n_before + n_rows)
        block_mask = mask_bS[:n_rows, longest - n_before : longest + n_rows]
        blocks.append(_fused(q_BbNH, k_BSKH[:, seen], v_BSKH[:, seen], block_mask, scale, dropout_p))
    return torch.cat(blocks, dim=1)


@lru_cache(maxsize=2)
def _causal_band(longest: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores of a block of queries with ``longest`` keys before it; the masks of all are parts of it.

    Made once, and not for every layer anew.
    """
    key_pos = torch.arange(longest + _BLOCK) - longest
    hidden = key_pos > torch.arange(_BLOCK)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask, scale: float, dropout_p: float) -> Tensor:
    n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    # torch aligns is_causal to the first key, zoo to the last: they agree only for a square.
    plain = mask.is_plain(n_keys)
    square_causal = plain and mask.causal and n_queries == n_keys
    sees_all = plain and (n_queries == 1 or not mask.causal)
    dense = None if square_causal or sees_all else mask.dense(n_queries, n_keys, q_BTNH.device)
    return _fused(q_BTNH, k_BSKH, v_BSKH, dense, scale, dropout_p, is_causal=square_causal and n_queries > 1)


def _fused(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout_p: float,
    *,
    is_causal: bool = False,
) -> Tensor:
    # The heads that share keys go in as queries of one head: a kernel reads the keys for each head anew.
    fold = q_BTNH.shape[1] == 1 and q_BTNH.shape[2] != k_BSKH.shape[2]
    out = F.scaled_dot_product_attention(
        q_BTNH.squeeze(1).unflatten(1, (k_BSKH.shape[2], -1)) if fold else q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2] and not fold,
    )
    return out.flatten(1, 2).unsqueeze(1) if fold else out.transpose(1, 2)
