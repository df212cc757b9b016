"""Attention by its definition, in float64, one query and one head at a time: what every backend is compared with.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.models.masks import Mask


def is_visible(mask: Mask, row: int, query: int, key: int) -> bool:
    """The definition of a mask, in words of its own."""
    allowed = not mask.causal or key <= query
    if mask.window is not None and query - key >= mask.window:
        allowed = False
    if key < mask.prefix:
        allowed = True
    if mask.documents_BS is not None and mask.documents_BS[row, query] != mask.documents_BS[row, key]:
        allowed = False
    if mask.padding_B is not None and key < mask.padding_B[row]:
        allowed = False
    return allowed


def visibility(mask: Mask, batch: int, n_queries: int, n_keys: int) -> Tensor:
    """Who sees whom, (B, T, S); without places of their own the queries are the last of the keys."""
    places = range(n_keys - n_queries, n_keys) if mask.queries_T is None else mask.queries_T.tolist()
    return torch.tensor([[[is_visible(mask, b, t, s) for s in range(n_keys)] for t in places] for b in range(batch)])


def by_the_formula(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, mask: Mask, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(q k^T scale) v in float64; zero where nothing is seen."""
    q, k, v = q_BTNH.double(), k_BSKH.double(), v_BSKH.double()
    (batch, n_queries, n_heads, _), n_keys, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    seen_BTS = visibility(mask, batch, n_queries, n_keys)
    rows = []
    for b in range(batch):
        for t in range(n_queries):
            keys = seen_BTS[b, t].nonzero()[:, 0].to(q.device)
            for n in range(n_heads):
                scores = k[b, keys, n // group] @ q[b, t, n] * scale
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                rows.append(scores.softmax(0) @ v[b, keys, n // group])
    return torch.stack(rows).view(q.shape)


def plain(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    seen_BTS: Tensor | None = None,
) -> Tensor:
    """The same in the dtype of the inputs, all at once: how exact a backend can be expected to be.

    Args:
        seen_BTS: who sees whom, where that is known already.
    """
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (x.repeat_interleave(group, dim=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH * scale, k_BSNH)
    scores_BNTS = scores_BNTS if softcap is None else (scores_BNTS / softcap).tanh() * softcap
    if seen_BTS is None:
        seen_BTS = visibility(mask, q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1])
    seen = seen_BTS.to(q_BTNH.device)
    weights = scores_BNTS.masked_fill(~seen[:, None], float("-inf")).softmax(-1).masked_fill(~seen[:, None], 0.0)
    return torch.einsum("bnts,bsnh->btnh", weights, v_BSNH)
