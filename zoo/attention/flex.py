"""torch's FlexAttention: the mask as a function, compiled into the kernel, blocks that it hides skipped.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.attention.base import AttentionRequest
from zoo.models.masks import Mask


class Flex:
    """`torch.nn.attention.flex_attention`, compiled at the first call (tens of seconds on a CPU)."""

    def supports(self, request: AttentionRequest) -> list[str]:
        """Backward passes need CUDA; there is no dropout."""
        reasons = []
        if request.training and request.device == "cpu":
            reasons.append("FlexAttention has no backward on CPU")
        if request.device not in ("cpu", "cuda"):
            reasons.append(f"FlexAttention runs on cpu and cuda, not on {request.device}")
        if request.dropout:
            reasons.append("FlexAttention has no dropout")
        if request.device == "cuda" and request.d_head < 16:
            reasons.append(f"FlexAttention's CUDA kernels need heads of at least 16, not {request.d_head}")
        return reasons

    def __call__(
        self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, mask: Mask, scale: float, dropout_p: float
    ) -> Tensor:
        """Raises `ValueError` for dropout, which it can not do."""
        if dropout_p:
            raise ValueError("FlexAttention has no dropout")
        out_BNTH: Tensor = _compiled()(
            q_BTNH.transpose(1, 2),
            k_BSKH.transpose(1, 2),
            v_BSKH.transpose(1, 2),
            block_mask=_block_mask(mask, q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.device),
            scale=scale,
            enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
        )
        return out_BNTH.transpose(1, 2)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _block_mask(mask: Mask, n_queries: int, n_keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    offset = n_keys - n_queries
    documents = mask.documents_BS

    def mask_mod(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = mask.visible(q + offset, k)
        if documents is not None:
            allowed = allowed & (documents[b, q + offset] == documents[b, k])
        return allowed

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(mask_mod, batch, None, n_queries, n_keys, device=str(device))
