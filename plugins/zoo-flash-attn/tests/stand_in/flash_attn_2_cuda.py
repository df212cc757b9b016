"""A stand-in for FlashAttention 2's compiled extension: its five entry points with their arguments and checks.

The real Python package imports this module by its name. What zoo does not use is refused, and never ignored.

Shape letters: B batch, T query tokens, S key tokens, M tokens of all sequences, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from kernel import Options, backward, check, check_inputs, forward, rotated
from torch import Tensor


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: None,
    alibi_slopes: None,
    dropout_p: float,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, T, N, H), k and v (B, S, K, H): result, logarithms of sums (B, N, T), nothing, state of the dropout."""
    _refuse(out, alibi_slopes, generator, return_softmax or None)
    check_inputs(q, k, v, softcap, dropout_p)
    state = _random_state(dropout_p)
    options = Options(scale, causal, left, right, softcap, dropout_p, int(state[0]))
    results = [forward(q[b], k[b], v[b], options.of_sequence(b)) for b in range(len(q))]
    outs, sums = zip(*results, strict=True)
    return torch.stack(outs), torch.stack(sums), q.new_empty(0), state


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    alibi_slopes: None,
    dropout_p: float,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, written into dq, dk and dv."""
    _refuse(alibi_slopes, generator)
    check_inputs(q, k, v, softcap, dropout_p)
    options = Options(scale, causal, left, right, softcap, dropout_p, int(state[0]))
    for b in range(len(q)):
        gradients = backward(dout[b], q[b], k[b], v[b], out[b], lse[b], options.of_sequence(b))
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place[b] = gradient
    return dq, dk, dv, lse.new_zeros(0)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: None,
    leftpad_k: None,
    block_table: None,
    alibi_slopes: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float,
    zero_tensors: bool,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (M, N, H), k and v (M, K, H) of all sequences: as `fwd`, the logarithms of sums (N, M)."""
    _refuse(out, seqused_k, leftpad_k, block_table, alibi_slopes, generator, return_softmax or None)
    check_inputs(q, k, v, softcap, dropout_p)
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    state = _random_state(dropout_p)
    options = Options(scale, causal, left, right, softcap, dropout_p, int(state[0]))
    result, sums = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for number, (queries, keys) in enumerate(sequences):
        one = forward(q[queries], k[keys], v[keys], options.of_sequence(number))
        result[queries], sums[:, queries] = one
    return result, sums, q.new_empty(0), state


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float,
    zero_tensors: bool,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bwd`, for sequences one after the other."""
    _refuse(alibi_slopes, generator)
    check_inputs(q, k, v, softcap, dropout_p)
    options = Options(scale, causal, left, right, softcap, dropout_p, int(state[0]))
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for number, (queries, keys) in enumerate(sequences):
        kept = (q[queries], k[keys], v[keys], out[queries], lse[:, queries])
        dq[queries], dk[keys], dv[keys] = backward(dout[queries], *kept, options.of_sequence(number))
    return dq, dk, dv, lse.new_zeros(0)


def fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: None,
    leftpad: Tensor | None,
    block_table: None,
    alibi_slopes: None,
    out: None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    interleaved: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """q (B, T, N, H) after what the caches (B, S, K, H) hold; k and v, if given, are rotated and stored first."""
    _refuse(cache_batch_idx, block_table, alibi_slopes, out)
    check_inputs(q, k_cache, v_cache, pads=True)
    for name, tensor in (("seqlens_k", seqlens), ("leftpad_k", leftpad)):
        check(tensor is None or tensor.dtype == torch.int32, f"{name} must have dtype int32")
        check(tensor is None or (tensor.is_contiguous() and tensor.shape == q.shape[:1]), f"{name} has a wrong shape")
    _check_new(q, k_cache, k, v, seqlens, rotary_cos, rotary_sin)
    # The kernel takes a length that is a multiple of its block without looking at the padding.
    check(leftpad is None or seqlens is not None, "the stand-in wants lengths with left padding")
    results = []
    for b in range(len(q)):
        n_held = k_cache.shape[1] if seqlens is None else int(seqlens[b])
        first = 0 if leftpad is None else int(leftpad[b])
        check(first <= n_held <= k_cache.shape[1], "the stand-in wants padding and lengths within the cache")
        query, end = q[b], n_held
        if k is not None and v is not None:
            place_T = torch.arange(k.shape[1], device=q.device) + n_held
            key, end = k[b], n_held + k.shape[1]
            if rotary_cos is not None and rotary_sin is not None:
                key = rotated(key, rotary_cos, rotary_sin, place_T - first, interleaved)
                moves = causal or left >= 0 or right >= 0
                query_T = place_T if moves else torch.full_like(place_T, n_held)
                query = rotated(query, rotary_cos, rotary_sin, query_T - first, interleaved)
            k_cache[b, place_T], v_cache[b, place_T] = key, v[b]
        options = Options(scale, causal, left, right, softcap)
        results.append(forward(query, k_cache[b, first:end], v_cache[b, first:end], options))
    outs, sums = zip(*results, strict=True)
    return torch.stack(outs), torch.stack(sums)


def _check_new(
    q: Tensor,
    cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    if k is None:
        check(cos is None, "If rotary cos/sin are provided, new key / value to be appended must also be provided")
        return
    check(v is not None, "If key is supplied, value must also be passed in")
    check(seqlens is not None, "If key is supplied, seqlens_k must also be passed in")
    check(k.dtype == q.dtype, "Key must have the same dtype as query")
    check(k.shape == (*q.shape[:2], *cache.shape[2:]), "k must have the shape of the cache's tokens")
    assert seqlens is not None
    check(int(seqlens.max()) + k.shape[1] <= cache.shape[1], "the stand-in wants room for the new tokens")
    if cos is not None:
        check(2 * cos.shape[1] <= q.shape[-1], "rotary_dim must be <= headdim")
        check(2 * cos.shape[1] % 16 == 0, "Only rotary dimensions divisible by 16 are currently supported")
        check(cos.shape[0] >= cache.shape[1], "cos/sin seqlen must be at least the seqlen of KV cache")
        check(cos.is_contiguous() and cos.dtype == q.dtype, "rotary_cos must have the same dtype as query")
        check(sin is not None and sin.shape == cos.shape and sin.dtype == cos.dtype, "rotary sin must be provided")


def _sequences(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    check(cu_q.dtype == torch.int32, "cu_seqlens_q must have dtype int32")
    check(cu_k.dtype == torch.int32, "cu_seqlens_k must have dtype int32")
    check(cu_q.is_contiguous() and cu_k.is_contiguous() and cu_q.shape == cu_k.shape, "cu_seqlens must be alike")
    # The kernel would not compute what lies beyond these.
    check(int(cu_q.diff().max()) <= max_q and int(cu_k.diff().max()) <= max_k, "a sequence is longer than the longest")
    borders = (pairwise(borders.tolist()) for borders in (cu_q, cu_k))
    return [(slice(*queries), slice(*keys)) for queries, keys in zip(*borders, strict=True)]


def _random_state(dropout_p: float) -> Tensor:
    """From torch's own generator, as the kernel's is."""
    return torch.randint(2**31, (2,)) if dropout_p > 0 else torch.zeros(2, dtype=torch.int64)


def _refuse(*arguments: Any) -> None:
    if any(argument is not None for argument in arguments):
        raise NotImplementedError("the stand-in does not know this argument")
