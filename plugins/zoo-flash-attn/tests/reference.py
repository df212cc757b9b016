"""Attention by its formula, written for these tests: visibility key by key, in float64 or in the inputs' own dtype.

FlashAttention's rule for its own tests: in half precision the error is at most twice that of plain torch. For the
gradients that its kernels compute, three times.

Shape letters: B batch, T query tokens, S key tokens, N query heads, K kv heads, G = N / K, H head size.
"""

from __future__ import annotations

import torch
from tier import ON_GPU
from torch import Tensor

from zoo.models.masks import Mask

HALVES = (torch.float16, torch.bfloat16)
OF_GRADIENTS = 3 if ON_GPU else 2
"""How many times the error of plain torch is allowed for gradients."""


def is_visible(mask: Mask, b: int, query: int, key: int) -> bool:
    """The definition of a mask, in words of its own."""
    if mask.causal and key > query:
        return False
    if mask.window is not None and key <= query - mask.window:
        return False
    if mask.padding_B is not None and key < int(mask.padding_B[b]):
        return False
    return mask.documents_BS is None or bool(mask.documents_BS[b, query] == mask.documents_BS[b, key])


def visibility(mask: Mask, batch: int, n_queries: int, n_keys: int) -> Tensor:
    """(B, T, S); without positions of their own the queries are the last of the keys."""
    positions = range(n_keys - n_queries, n_keys) if mask.queries_T is None else mask.queries_T.tolist()
    seen = [[[is_visible(mask, b, query, key) for key in range(n_keys)] for query in positions] for b in range(batch)]
    return torch.tensor(seen)


def attention(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, seen_BTS: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention in the dtype of its inputs; zero where nothing is seen."""
    n_groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (x.repeat_interleave(n_groups, dim=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH * scale, k_BSNH)
    if softcap is not None:
        scores_BNTS = (scores_BNTS / softcap).tanh() * softcap
    hidden_B1TS = ~seen_BTS[:, None].to(q_BTNH.device)
    weights_BNTS = scores_BNTS.masked_fill(hidden_B1TS, float("-inf")).softmax(-1)
    return torch.einsum("bnts,bsnh->btnh", weights_BNTS.masked_fill(hidden_B1TS, 0.0), v_BSNH)


def check(found: Tensor, plain: Tensor, exact: Tensor, times: int = 2) -> None:
    """Assert that ``found`` is as near to ``exact`` (float64) as FlashAttention promises, given ``plain`` torch."""
    assert found.shape == exact.shape and found.dtype == plain.dtype
    error, allowed = (found.double() - exact).abs().max(), times * (plain.double() - exact).abs().max() + 1e-5
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
