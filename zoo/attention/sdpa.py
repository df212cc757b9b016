"""torch's fused scaled-dot-product attention.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attention.base import AttentionRequest
from zoo.models.masks import Mask

_BLOCK = 128
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
        if q_BTNH.device.type != "cpu" or n_queries <= _BLOCK or not causal_alone or torch.is_grad_enabled():
            return _attend(q_BTNH, k_BSKH, v_BSKH, mask, scale, dropout_p)
        n_seen = n_keys - n_queries
        ends = [min(start + _BLOCK, n_queries) for start in range(0, n_queries, _BLOCK)]
        blocks = [
            _attend(q_BbNH, k_BSKH[:, : n_seen + end], v_BSKH[:, : n_seen + end], mask, scale, dropout_p)
            for q_BbNH, end in zip(q_BTNH.split(_BLOCK, dim=1), ends, strict=True)
        ]
        return torch.cat(blocks, dim=1)


def _attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask, scale: float, dropout_p: float) -> Tensor:
    n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    # torch aligns is_causal to the first key, zoo to the last: they agree only for a square.
    plain = mask.is_plain(n_keys)
    square_causal = plain and mask.causal and n_queries == n_keys
    sees_all = plain and (n_queries == 1 or not mask.causal)
    dense = None if square_causal or sees_all else mask.dense(n_queries, n_keys, q_BTNH.device)
    # The heads that share keys go in as queries of one head: a kernel reads the keys for each head anew.
    fold = n_queries == 1 and q_BTNH.shape[2] != k_BSKH.shape[2]
    out = F.scaled_dot_product_attention(
        q_BTNH.squeeze(1).unflatten(1, (k_BSKH.shape[2], -1)) if fold else q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=dense,
        dropout_p=dropout_p,
        is_causal=square_causal and n_queries > 1,
        scale=scale,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2] and not fold,
    )
    return out.flatten(1, 2).unsqueeze(1) if fold else out.transpose(1, 2)
