"""A stand-in for `flash_attn_3._C`, FlashAttention 3's compiled part: the operators ``flash_attn_3::fwd`` and ``bwd``.


One operator serves what are three entry points in FlashAttention 2, and the same formulas compute it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

second: Any = import_module("flash_attn_2_cuda")
_LIBRARY = torch.library.Library("flash_attn_3", "DEF")
_LIBRARY.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? qv, Tensor? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float? softmax_scale, bool is_causal, int left, int right, int chunk, float softcap, bool interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!)? dq, Tensor(b!)? dk, "
    "Tensor(c!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "int? max_seqlen_q, int? max_seqlen_k, float? softmax_scale, bool is_causal, int left, int right, float softcap, "
    "bool deterministic, int sm_margin) -> (Tensor, Tensor, Tensor, Tensor)"
)
CALLS: list[str] = []
"""Which of the three each call was, so that a test can tell that FlashAttention 3 has run."""


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k_new, v_new, qv, out, cu_q, cu_k, cu_new, used_q, used_k, max_q, max_k, pages, rows, leftpad = rest[:14]
    cos, sin, rotary_seqlens, dq, dk, dv, scale, causal, left, right, chunk, softcap, interleaved = rest[14:27]
    if any(x is not None for x in (qv, out, cu_new, used_q, pages, rows, rotary_seqlens, dq, dk, dv)) or chunk:
        raise NotImplementedError("the stand-in does not know this argument")
    window = (causal, left, right, softcap)
    if cu_q is not None:
        CALLS.append("varlen")
        lengths = (None, None, None, None, max_q, max_k)
        result, lse, *_ = second.varlen_fwd(
            q, k, v, None, cu_q, cu_k, *lengths, 0.0, scale, False, *window, False, None
        )
    elif used_k is not None:
        CALLS.append("cached")
        new = (k_new, v_new, used_k, cos, sin)
        result, lse = second.fwd_kvcache(q, k, v, *new, None, leftpad, None, None, None, scale, *window, interleaved, 0)
    else:
        CALLS.append("dense")
        result, lse, *_ = second.fwd(q, k, v, None, None, 0.0, scale, *window, False, None)
    return result, lse, q.new_empty(0), q.new_empty(0)


def _bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, (cu_q, cu_k, _, _, max_q, max_k) = arguments[:9], arguments[9:15]
    scale, causal, left, right, softcap, deterministic = arguments[15:21]
    window = (causal, left, right, softcap, deterministic, None, torch.zeros(2, dtype=torch.int64))
    if cu_q is None:
        dq, dk, dv, rest = second.bwd(*tensors, None, 0.0, scale, *window)
    else:
        dq, dk, dv, rest = second.varlen_bwd(*tensors, cu_q, cu_k, None, max_q, max_k, 0.0, scale, False, *window)
    # An operator may not return what it was given.
    return dq.clone(), dk.clone(), dv.clone(), rest


_LIBRARY.impl("fwd", _fwd, "CPU")
_LIBRARY.impl("bwd", _bwd, "CPU")
