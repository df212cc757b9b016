"""Attention as the formula says: scores, mask, softmax, weighted sum. The reference for every other backend.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, G = N/K, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attention.base import AttentionRequest
from zoo.models.masks import Mask


class Eager:
    """Materializes all scores; any device, dtype and mask."""

    def supports(self, request: AttentionRequest) -> list[str]:
        """Everything."""
        return []

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
        """Softmax in float32: half precision loses the small weights of long rows."""
        n_kv_heads = k_BSKH.shape[2]
        q_BTKGH = q_BTNH.unflatten(2, (n_kv_heads, -1))
        scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH.float(), k_BSKH.float()) * scale
        if softcap is not None:
            scores_BKGTS = softcap * torch.tanh(scores_BKGTS / softcap)
        hidden = ~mask.dense(q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.device)[:, :, None]
        weights_BKGTS = scores_BKGTS.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        weights_BKGTS = weights_BKGTS.masked_fill(hidden, 0.0)  # a row that sees nothing is NaN until here
        weights_BKGTS = F.dropout(weights_BKGTS, dropout_p)
        out_BTKGH = torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH.float())
        return out_BTKGH.flatten(2, 3).to(q_BTNH.dtype)
