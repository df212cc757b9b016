"""Attention with one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.attention.base import AttentionRequest
from zoo.attention.eager import Eager
from zoo.models.masks import Mask
from zoo.models.rope import swap_halves


class _Leaky(Mask):
    def visible(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return super().visible(query_pos + 1, key_pos)


class Changed(Eager):
    """The formula, of other arguments."""

    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        return super().__call__(*self.change(q_BTNH, k_BSKH, v_BSKH, options), **options)


class LeakyMask(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["mask"] = _Leaky(**vars(options["mask"]))
        return q, k, v


class TopLeft(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["mask"] = replace(options["mask"], queries_T=torch.arange(q.shape[1]))
        return q, k, v


class WiderWindow(Changed):
    step = 1

    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        mask = options["mask"]
        options["mask"] = mask if mask.window is None else replace(mask, window=mask.window + self.step)
        return q, k, v


class NarrowerWindow(WiderWindow):
    step = -1


class NoSoftcap(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options.pop("softcap", None)
        return q, k, v


class MixedHeads(Eager):
    """Query head n reads kv head n % K."""

    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        n_groups = q_BTNH.shape[2] // k_BSKH.shape[2]
        return super().__call__(q_BTNH, k_BSKH.repeat(1, 1, n_groups, 1), v_BSKH.repeat(1, 1, n_groups, 1), **options)


class OwnScale(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["scale"] = q.shape[-1] ** -0.5
        return q, k, v


class MaskDropped(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["mask"] = Mask(causal=False)
        return q, k, v


class DocumentsIgnored(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["mask"] = replace(options["mask"], documents_BS=None)
        return q, k, v


class PaddingIgnored(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["mask"] = replace(options["mask"], padding_B=None)
        return q, k, v


class PrefixIgnored(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["mask"] = replace(options["mask"], prefix=0)
        return q, k, v


class WritesInPlace(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            q.mul_(options["scale"])
            options["scale"] = 1.0
        return q, k, v


class ReadsViewsWrongly(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        strides = torch.empty(k.shape).stride()
        return q, k.as_strided(k.shape, strides), v.as_strided(v.shape, strides, v.storage_offset())


class NotANumber(Eager):
    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        seen = options["mask"].dense(q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.device).any(-1).transpose(1, 2)
        out = super().__call__(q_BTNH, k_BSKH, v_BSKH, **options)
        return out.masked_fill(~seen[..., None], float("nan"))


class AlwaysFloat32(Eager):
    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        return super().__call__(q_BTNH.float(), k_BSKH, v_BSKH, **options)


class HalfInside(Changed):
    """Scores in bfloat16, whatever the inputs are."""

    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return q.bfloat16().to(q.dtype), k.bfloat16().to(k.dtype), v


class KeysDetached(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return q, k.detach() + 0 * k, v


class DropoutIgnored(Changed):
    def change(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        options["dropout_p"] = 0.0
        return q, k, v


class DropoutUnscaled(Eager):
    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        return super().__call__(q_BTNH, k_BSKH, v_BSKH, **options) * (1 - options.get("dropout_p", 0.0))


class ClaimsTooMuch(Eager):
    """Fails for what it says that it can do."""

    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        if options.get("softcap") is not None:
            raise NotImplementedError
        return super().__call__(q_BTNH, k_BSKH, v_BSKH, **options)


class RefusesSilently(Eager):
    """Says that it has no dropout, and leaves it out when it is asked for."""

    def supports(self, request: AttentionRequest) -> list[str]:
        return ["no dropout"] if request.dropout else []

    def __call__(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        return super().__call__(q_BTNH, k_BSKH, v_BSKH, **{**options, "dropout_p": 0.0})


class ReasonIsNone(Eager):
    def supports(self, request: AttentionRequest) -> list[str]:
        return ["no"] if request.device == "mps" and not request.softcap else None  # type: ignore[return-value]


class CacheOneLate(Eager):
    """A step of decoding in one kernel that stores keys and values one place too far."""

    late = 1

    def append_and_attend(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, rotation: Any, rope: Any, cache: Any, **more: Any
    ) -> Tensor | None:
        at = cache.length + self.late
        if q_BTNH.shape[1] > 1 or at >= cache.capacity:
            return None
        q, k = (x * rotation[0] + swap_halves(x, rope.n_dims) * rotation[1] for x in (q_BTNH, k_BTKH))
        keys, values = (held[more["layer"]] for held in cache.tensors)
        keys[:, at : at + 1], values[:, at : at + 1] = k, v_BTKH
        seen = slice(cache.length + 1)
        options = {name: more[name] for name in ("mask", "scale", "softcap")}
        return self(q, keys[:, seen], values[:, seen], **options)
