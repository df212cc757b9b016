"""What FlashAttention's compiled kernels compute, in plain torch, one sequence at a time: for tests without a GPU.

All of it is float32 between inputs and results, so what is wrong beyond rounding is not the arithmetic's. It says
nothing of the kernels' speed, memory or errors.

Shape letters: T query tokens, S key tokens, N query heads, K kv heads, G = N / K, H head size, R rotary dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Arguments of every call. Windows count keys beside the query's own, -1 for all; ``softcap`` 0: none."""

    scale: float
    causal: bool
    left: int
    right: int
    softcap: float
    dropout_p: float = 0.0
    seed: int = 0

    def of_sequence(self, number: int) -> Options:
        """The same with a dropout of its own."""
        return Options(
            self.scale, self.causal, self.left, self.right, self.softcap, self.dropout_p, self.seed + 1000 * number
        )


def check(condition: bool, message: str) -> None:
    """As the extension does: a RuntimeError with its words."""
    if not condition:
        raise RuntimeError(message)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0, dropout_p: float = 0.0, *, pads: bool = False
) -> None:
    """What every entry point of the extension checks first, but for the GPU. One of them pads heads itself."""
    halves = (torch.float16, torch.bfloat16)
    check(q.dtype in halves, "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(pads or q.shape[-1] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    check(k.shape == v.shape, "v must have the shape of k")
    check(not (softcap > 0 and dropout_p > 0), "Softcapping does not support dropout for now")


def forward(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Result (T, N, H), and the logarithm (N, T) of each row's sum, inf where a row sees nothing."""
    scores_NTS = _scores(q_TNH, k_SKH, options)
    lse_NT = scores_NTS.logsumexp(-1)
    lse_NT = lse_NT.masked_fill(lse_NT == -math.inf, math.inf)
    largest_NT1 = scores_NTS.amax(-1, keepdim=True) if k_SKH.shape[0] else lse_NT[..., None]
    weights_NTS = (scores_NTS - largest_NT1.clamp(min=-1e30)).exp()
    sums_NT1 = weights_NTS.sum(-1, keepdim=True)
    dropped_NTS = weights_NTS * _kept(weights_NTS, options)
    out_NTH = _product(dropped_NTS, _by_query_head(v_SKH, q_TNH)) / sums_NT1.clamp(min=1e-30)
    return out_NTH.transpose(0, 1).to(q_TNH.dtype), lse_NT


def backward(
    dout_TNH: Tensor, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, out_TNH: Tensor, lse_NT: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what the forward pass has kept."""
    scores_NTS = _scores(q_TNH, k_SKH, options)
    weights_NTS = (scores_NTS - lse_NT[..., None]).exp()
    kept_NTS = _kept(weights_NTS, options)
    q, dout, out = (x.transpose(0, 1) for x in (q_TNH, dout_TNH, out_TNH))
    k, v = _by_query_head(k_SKH, q_TNH), _by_query_head(v_SKH, q_TNH)
    dweights_NTS = _product(dout, v.mT) * kept_NTS
    dscores_NTS = weights_NTS * (dweights_NTS - (dout.float() * out.float()).sum(-1, keepdim=True))
    if options.softcap > 0:
        dscores_NTS = dscores_NTS * (1 - (scores_NTS.nan_to_num(neginf=0.0) / options.softcap) ** 2)
    dq_NTH = _product(dscores_NTS, k) * options.scale
    dk_NSH = _product(dscores_NTS.mT, q) * options.scale
    dv_NSH = _product((weights_NTS * kept_NTS).mT, dout)
    dk_KSH, dv_KSH = (x.unflatten(0, (k_SKH.shape[1], -1)).sum(1) for x in (dk_NSH, dv_NSH))
    dq_TNH, dk_SKH, dv_SKH = (x.transpose(0, 1).to(q_TNH.dtype) for x in (dq_NTH, dk_KSH, dv_KSH))
    return dq_TNH, dk_SKH, dv_SKH


def rotated(x_TNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, place_T: Tensor, interleaved: bool) -> Tensor:
    """x at these places: pairs of neighbours, or of dimensions half of the rotary ones apart."""
    cos, sin = (table[place_T].float()[:, None] for table in (cos_SR, sin_SR))
    n_dims = 2 * cos.shape[-1]
    turning, rest = x_TNH[..., :n_dims].float(), x_TNH[..., n_dims:]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x_TNH.dtype), rest), dim=-1)


def _scores(q_TNH: Tensor, k_SKH: Tensor, options: Options) -> Tensor:
    """Scores (N, T, S) in float32, -inf where hidden. The last query belongs to the last key."""
    n_queries, n_keys = len(q_TNH), len(k_SKH)
    scores_NTS = _product(q_TNH.transpose(0, 1), _by_query_head(k_SKH, q_TNH).mT) * options.scale
    if options.softcap > 0:
        scores_NTS = options.softcap * torch.tanh(scores_NTS / options.softcap)
    ahead_TS = torch.arange(n_keys)[None] - torch.arange(n_queries)[:, None] - (n_keys - n_queries)
    ahead_TS = ahead_TS.to(q_TNH.device)
    left = -1 if options.left >= n_keys else options.left
    right = 0 if options.causal else -1 if options.right >= n_keys else options.right
    hidden_TS = torch.zeros_like(ahead_TS, dtype=torch.bool)
    if left >= 0:
        hidden_TS |= ahead_TS < -left
    if right >= 0:
        hidden_TS |= ahead_TS > right
    return scores_NTS.masked_fill(hidden_TS, -math.inf)


def _kept(weights_NTS: Tensor, options: Options) -> Tensor:
    """Factors on the weights: 0 where dropped, and larger elsewhere."""
    if options.dropout_p == 0:
        return torch.ones_like(weights_NTS)
    generator = torch.Generator().manual_seed(options.seed)
    return (torch.rand(weights_NTS.shape, generator=generator) >= options.dropout_p) / (1 - options.dropout_p)


def _by_query_head(x_SKH: Tensor, q_TNH: Tensor) -> Tensor:
    return x_SKH.transpose(0, 1).repeat_interleave(q_TNH.shape[1] // x_SKH.shape[1], dim=0)


def _product(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # kernels know nothing of it
        return x.float() @ y.float()
