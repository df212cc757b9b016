"""torch's FlexAttention: the mask as a function, compiled into the kernel, blocks that it hides skipped.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F

from zoo.attention.base import AttentionRequest
from zoo.models.masks import Mask


class Flex:
    """`torch.nn.attention.flex_attention`, compiled at the first call of a shape (seconds each)."""

    def supports(self, request: AttentionRequest) -> list[str]:
        """Backward passes need CUDA; there is no dropout."""
        reasons = []
        if request.training and request.device == "cpu":
            reasons.append("FlexAttention has no backward on CPU")
        if request.device not in ("cpu", "cuda"):
            reasons.append(f"FlexAttention runs on cpu and cuda, not on {request.device}")
        if "queries" in request.mask_features:
            reasons.append("flex takes the queries to be the last tokens, which compiled decoding does not")
        if request.dropout:
            reasons.append("FlexAttention has no dropout")
        if request.device == "cuda" and request.d_head < 16:
            reasons.append(f"FlexAttention's CUDA kernels need heads of at least 16, not {request.d_head}")
        return reasons

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
        """Raises `ValueError` for dropout, which it can not do."""
        if dropout_p:
            raise ValueError("FlexAttention has no dropout")
        if mask.queries_T is not None:
            raise ValueError("flex takes the queries to be the last tokens")
        n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
        t, s = _bucket(n_queries), _bucket(n_keys)
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            out_BNTH: Tensor = _compiled()(
                _padded(q_BTNH, t).transpose(1, 2),
                _padded(k_BSKH, s).transpose(1, 2),
                _padded(v_BSKH, s).transpose(1, 2),
                block_mask=_block_mask(mask, n_queries, n_keys, q_BTNH.device),
                score_mod=_score_mod(softcap),
                scale=scale,
                enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
            )
        return out_BNTH[:, :, :n_queries].transpose(1, 2)


def _bucket(n_tokens: int) -> int:
    """A length to pad to: few lengths mean few compilations, and the kernels' dynamic shapes fail on CPU."""
    return n_tokens if n_tokens == 1 else max(16, 1 << (n_tokens - 1).bit_length())


def _padded(x_BTNH: Tensor, n_tokens: int) -> Tensor:
    missing = n_tokens - x_BTNH.shape[1]
    return F.pad(x_BTNH, (0, 0, 0, 0, 0, missing)) if missing else x_BTNH


@cache
def _score_mod(softcap: float | None) -> Any:
    if softcap is None:
        return None

    def capped(score: Tensor, b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)  # every layer of a forward pass asks for the same one
def _block_mask(mask: Mask, n_queries: int, n_keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    t, s = _bucket(n_queries), _bucket(n_keys)
    with torch.inference_mode(False):  # or a later training step could not use what was made while generating
        # Tensors, since captured numbers that change from call to call would compile anew.
        offset = torch.tensor(n_keys - n_queries, device=device)
        end = torch.tensor(n_keys, device=device)
        documents = None if mask.documents_BS is None else F.pad(mask.documents_BS, (0, t + s), value=-1)
        padding = None if mask.padding_B is None else mask.padding_B.clone()

    def mask_mod(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = mask.visible(q + offset, k) & (k < end)
        if documents is not None:
            allowed = allowed & (documents[b, q + offset] == documents[b, k])
        if padding is not None:
            allowed = allowed & (k >= padding[b])
        return allowed

    per_row = documents if documents is not None else padding
    batch = None if per_row is None else per_row.shape[0]
    return create_block_mask(mask_mod, batch, None, t, s, device=str(device))
