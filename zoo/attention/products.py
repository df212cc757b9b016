"""Causal attention for training in bfloat16 on a CPU: matrix products over blocks of queries.

torch's fused kernel takes two and a half times as long there (128 tokens, forward and backward), and its gradients are
twice as far from those in float64. Here scores and their gradients are float32, and all other products bfloat16.

Shape letters: B batch, T query tokens, S key/value tokens (the queries are the last T of them), N query heads, K kv
heads, G = N/K, H head size, b queries of a block, s keys that it sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 64
"""Queries at a time: scores beyond a block's end are not computed, and those of one block fit into the cache."""
_MAX_TOKENS = 2048
"""Of longer rows the fused kernel is as fast."""


def can_attend(q_BTNH: Tensor, k_BSKH: Tensor) -> bool:
    """Whether `attend_causally` is the faster way, and possible."""
    return (
        q_BTNH.device.type == "cpu"
        and q_BTNH.dtype == torch.bfloat16
        and k_BSKH.shape[1] <= _MAX_TOKENS
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def attend_causally(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, scale: float) -> Tensor:
    """Attention (B, T, N, H) of every query to its own key and those before. Keeps q, k and v for the backward pass."""
    y_BTNH: Tensor = _CausalAttention.apply(q_BTNH, k_BSKH, v_BSKH, scale)  # type: ignore[no-untyped-call]
    return y_BTNH


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_BTNH, k_BSKH, v_BSKH)
        ctx.scale = scale
        n_kv_heads = k_BSKH.shape[2]
        q, k, v = (_by_kv_head(x, n_kv_heads) for x in (q_BTNH, k_BSKH, v_BSKH))
        k_float = k.float()
        y = torch.empty_like(q)
        for block, seen in _blocks(q.shape[2], k.shape[2]):
            weights = _weights(q[:, :, block], k_float[:, 0, seen], scale)
            y[:, :, block] = _product(weights.to(q.dtype), v[:, 0, seen])
        return _by_token(y, q_BTNH.shape[0])

    @staticmethod
    def backward(ctx: Any, dy_BTNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BTNH, k_BSKH, v_BSKH = ctx.saved_tensors
        batch, n_kv_heads = k_BSKH.shape[0], k_BSKH.shape[2]
        q, k, v, dy = (_by_kv_head(x, n_kv_heads) for x in (q_BTNH, k_BSKH, v_BSKH, dy_BTNH))
        k_float, v_float = k.float(), v.float()
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k_float[:, 0]), torch.zeros_like(v_float[:, 0])
        for block, seen in _blocks(q.shape[2], k.shape[2]):
            weights = _weights(q[:, :, block], k_float[:, 0, seen], ctx.scale)
            dweights = _product(dy[:, :, block].float(), v_float[:, 0, seen].mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, torch.float32).to(q.dtype)
            dq[:, :, block] = _product(dscores, k[:, 0, seen])
            dk[:, seen] += torch.bmm(dscores.flatten(1, 2).mT, q[:, :, block].flatten(1, 2))
            dv[:, seen] += torch.bmm(weights.to(q.dtype).flatten(1, 2).mT, dy[:, :, block].flatten(1, 2))
        gradients = (dq.mul_(ctx.scale), dk.mul_(ctx.scale).to(k.dtype)[:, None], dv.to(v.dtype)[:, None])
        dq_BTNH, dk_BSKH, dv_BSKH = (_by_token(x, batch) for x in gradients)
        return dq_BTNH, dk_BSKH, dv_BSKH, None


def _by_kv_head(x_BTNH: Tensor, n_kv_heads: int) -> Tensor:
    """(B, T, K * G, H) as (B * K, G, T, H): the heads that share keys become queries of one product."""
    return x_BTNH.unflatten(2, (n_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(x: Tensor, batch: int) -> Tensor:
    """(B * K, G, T, H) as (B, T, K * G, H)."""
    return x.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """(B * K, G, b, .) times (B * K, ., .) for each of the G."""
    return torch.bmm(x.flatten(1, 2), y).unflatten(1, x.shape[1:3])


def _blocks(n_queries: int, n_keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys up to the last query of each."""
    for start in range(0, n_queries, _BLOCK):
        end = min(start + _BLOCK, n_queries)
        yield slice(start, end), slice(n_keys - n_queries + end)


def _weights(q: Tensor, k_float: Tensor, scale: float) -> Tensor:
    """Softmax of the scores (B * K, G, b, s) of queries and the keys (B * K, s, H) up to the last of them, float32."""
    n_queries = q.shape[2]
    scores = _product(q.float() * scale, k_float.mT)
    scores[..., -n_queries:] += torch.full((n_queries, n_queries), float("-inf")).triu_(1)  # no key after the query
    return scores.softmax(dim=-1)
