"""FlashAttention behind zoo's interface of attention backends: for each mask the cheapest call that computes it.

| mask | call |
|---|---|
| causal, full, window | ``flash_attn_func`` |
| documents, padding with gradients | ``flash_attn_varlen_func``: only what sees each other is computed |
| padding without gradients, room behind the queries | ``flash_attn_with_kvcache``: the keys stay where they are |

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.base import AttentionRequest
from zoo.models.cache import KVCache
from zoo.models.masks import Mask
from zoo.models.rope import Rotation
from zoo.spec import RopeSpec
from zoo_flash_attn.decode import attend_in_cache, rotates_inside, store_and_attend, window_of
from zoo_flash_attn.install import kernels_for, load_flash_attn
from zoo_flash_attn.segments import segments_of

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD = 256
_MAX_HEAD_WITH_DROPOUT = 192
"""Of training on GPUs with less shared memory than an A100: beyond it the backward kernel computes nothing at all."""
_SHARED_MEMORY_OF_A100 = 144 * 1024
_MAX_STEP = 16
"""Tokens at a time for which the kernel that also stores keys is made; a prompt is faster in the other."""


class Flash:
    """FlashAttention 2; on Hopper GPUs FlashAttention 3 where it is installed and has what is asked for."""

    def __init__(self) -> None:
        load_flash_attn()

    def supports(self, request: AttentionRequest) -> list[str]:
        """What the kernels check before a call, and what their interface can not say."""
        reasons = []
        if request.device != "cuda":
            reasons.append(f"FlashAttention runs on cuda, not on {request.device}")
        if request.dtype not in _DTYPES:
            name = str(request.dtype).removeprefix("torch.")
            reasons.append(f"FlashAttention computes in float16 and bfloat16, not {name}: take --precision bf16-true")
        if request.d_head > _MAX_HEAD:
            reasons.append(f"FlashAttention's heads have at most {_MAX_HEAD} dimensions, not {request.d_head}")
        if request.softcap and request.dropout:
            reasons.append("FlashAttention has no dropout for soft-capped scores")
        if request.training and request.dropout and request.d_head > _MAX_HEAD_WITH_DROPOUT and _is_small_gpu():
            reasons.append(
                f"FlashAttention's gradients with dropout end at heads of {_MAX_HEAD_WITH_DROPOUT} on this GPU, and "
                f"these have {request.d_head}"
            )
        return reasons + _beyond_the_kernels(request.mask_features)

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
        """As `zoo.models.attention.Attend`. Under autocast q, k and v are cast, as for torch's own attention.

        Raises:
            ValueError: a mask that `supports` refuses, or a document that is no single run of tokens.
            RuntimeError: FlashAttention's own, for dtypes, sizes and options that `supports` refuses.
        """
        if reasons := _beyond_the_kernels(mask.features):
            raise ValueError("; ".join(reasons))
        q, k, v = _as_autocast((q_BTNH, k_BSKH, v_BSKH))
        learns = dropout_p > 0 or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        pads_alone = mask.padding_B is not None and mask.documents_BS is None
        if mask.queries_T is not None or (pads_alone and not learns):
            return attend_in_cache(q, k, v, mask, scale, softcap)
        options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": mask.causal,
            "window_size": window_of(mask, k.shape[1]),
            "softcap": softcap or 0.0,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if dropout_p:  # FlashAttention 3 has none, and no argument for it
            options["dropout_p"] = dropout_p
        kernels = kernels_for(q, dropout_p)
        if mask.documents_BS is None and mask.padding_B is None:
            return kernels.dense(q, k, v, **options)
        segments = segments_of(mask, *q.shape[:2], k.shape[1])
        out: Tensor = kernels.varlen(
            q.flatten(0, 1),
            *(x.flatten(0, 1) if segments.kept is None else x.flatten(0, 1)[segments.kept] for x in (k, v)),
            cu_seqlens_q=segments.queries_G1,
            cu_seqlens_k=segments.keys_G1,
            max_seqlen_q=segments.max_queries,
            max_seqlen_k=segments.max_keys,
            **options,
        )
        return out.unflatten(0, q.shape[:2])

    def append_and_attend(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        rotation: Rotation | None,
        rope: RopeSpec | None,
        cache: object,
        layer: int,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor | None:
        """A step of decoding in one kernel: rotates q and k, stores k and v in ``cache``, attends.

        Args:
            rotation: of the T new tokens, or None where nothing rotates.
            rope: how ``rotation`` pairs dimensions.
            cache: with what ``layer`` (counted from 0) holds; the kernel writes into it, the caller advances it.

        Returns:
            Attention (B, T, N, H); None, with nothing done, where the kernel can not do all of it.
        """
        fits = (
            mask.features <= {"causal", "window"}
            and q_BTNH.shape[1] <= _MAX_STEP
            and q_BTNH.shape[3] % 8 == 0  # or the kernel would copy the whole cache
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )
        if not (fits and isinstance(cache, KVCache) and rotates_inside(rotation, rope)):
            return None
        keys, values = (held[layer] for held in cache.tensors)
        if not q_BTNH.dtype == k_BTKH.dtype == v_BTKH.dtype == keys.dtype:
            return None
        return store_and_attend(
            q_BTNH, k_BTKH, v_BTKH, keys, values, cache.length, rotation, rope, mask=mask, scale=scale, softcap=softcap
        )


def _beyond_the_kernels(features: frozenset[str]) -> list[str]:
    """What no call of FlashAttention can say."""
    reasons = []
    if "prefix" in features:
        reasons.append("FlashAttention has no prefix that every query sees")
    if "queries" in features and "full" in features:
        reasons.append("FlashAttention hides the room behind the queries only where attention is causal")
    if "queries" in features and "documents" in features:
        reasons.append("FlashAttention has no documents in a cache of fixed length")
    return reasons


def _as_autocast(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary angles in float32 make q and k float32 under autocast, which v is not."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return q, k, v


def _is_small_gpu() -> bool:
    if not torch.cuda.is_available():
        return False
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return bool(properties.shared_memory_per_block_optin < _SHARED_MEMORY_OF_A100)
