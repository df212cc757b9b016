"""The contract of an attention backend, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import UnavailableError
from zoo.models.masks import Mask
from zoo.registry import Registry, component_status
from zoo.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What a model will ask of a backend."""

    device: str
    """Device type: ``cpu``, ``cuda``, ``mps``."""
    dtype: torch.dtype
    n_heads: int
    n_kv_heads: int
    d_head: int
    training: bool = False
    """Whether gradients are needed."""
    mask_features: frozenset[str] = frozenset({"causal"})
    """`Mask.features` that will occur."""
    dropout: bool = False
    softcap: bool = False
    """Whether scores are soft-capped."""

    @classmethod
    def of(cls, spec: ModelSpec, *, device: str, dtype: torch.dtype, training: bool = False) -> AttentionRequest:
        """What the decoder of ``spec`` will ask for."""
        return cls(
            device=device,
            dtype=dtype,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            d_head=spec.d_head,
            training=training,
            mask_features=frozenset({"causal"} if spec.window is None else {"causal", "window"}),
            dropout=training and spec.attn_dropout > 0,
            softcap=spec.attn_softcap is not None,
        )


class AttentionBackend(Protocol):
    """One implementation of attention. It may also have what `zoo.models.attention.AppendAndAttend` says."""

    def supports(self, request: AttentionRequest) -> list[str]:
        """Why the request can not be served, one sentence each; empty: it can."""

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
        """Attention as `zoo.models.attention.Attend` asks for it."""


AUTO_ORDER = {"cuda": ("sdpa", "flex", "eager"), "other": ("sdpa", "eager")}
"""What ``auto`` tries, by device type: elsewhere, compiling for every length makes flex slower than the formula.

Only built-ins: installing a plugin changes nobody's results.
"""


@dataclass(frozen=True)
class Choice:
    """A backend, its name, and why those before it in `AUTO_ORDER` were not possible."""

    name: str
    backend: AttentionBackend
    rejected: dict[str, list[str]]


def choose_attention(name: str, request: AttentionRequest, registry: Registry) -> Choice:
    """The backend of that name, or for ``auto`` the first that can serve the request.

    Raises:
        UnknownNameError: no backend has this name.
        UnavailableError: the named one can not serve the request; an explicit choice never falls back.
    """
    if name != "auto":
        backend: AttentionBackend = registry.load("attention", name)()
        if reasons := backend.supports(request):
            raise UnavailableError(
                f"attention {name!r} can not serve this model here: {'; '.join(reasons)}.",
                fix="Take --attention auto, or see: python -m zoo list attention.",
            )
        return Choice(name, backend, {})
    rejected: dict[str, list[str]] = {}
    for candidate in AUTO_ORDER.get(request.device, AUTO_ORDER["other"]):
        status = component_status(registry.find("attention", candidate))
        if status.state != "ok":
            rejected[candidate] = list(status.reasons)
            continue
        backend = registry.load("attention", candidate)()
        if not (reasons := backend.supports(request)):
            return Choice(candidate, backend, rejected)
        rejected[candidate] = reasons
    raise AssertionError("eager serves every request")
