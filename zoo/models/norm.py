"""Normalization. All of it computes its statistics in float32, whatever the input's dtype.

Shape letters: B batch, T tokens, D model width, N heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.spec import ModelSpec


class RMSNorm(nn.RMSNorm):
    """RMS norm that rounds to the input's dtype before the weight, as Llama's reference does.

    That also spares float32 temporaries of the whole input: several times as fast on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension."""
        if x.dtype == torch.float32 or not x.requires_grad or torch.compiler.is_compiling():
            normed = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        else:
            normed = _Normalized.apply(x, self.eps)  # type: ignore[no-untyped-call]
        return normed if self.weight is None else normed * self.weight


class _Normalized(torch.autograd.Function):
    """RMS norm that keeps x for the backward pass, where autograd would keep a float32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x_half,) = ctx.saved_tensors
        x, dy = x_half.float(), grad.float()
        rstd = torch.rsqrt(_mean_product(x, x) + ctx.eps)
        dx = torch.addcmul(dy, x, _mean_product(x, dy) * -(rstd**2)).mul_(rstd)
        return dx.to(x_half.dtype), None


def _mean_product(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)[..., None] / x.shape[-1]


class OffsetRMSNorm(nn.Module):
    """RMS norm whose stored weight lacks ``offset`` (Gemma: 1)."""

    def __init__(self, width: int, *, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes the last dimension; the product with the weight is float32 too, as in the reference."""
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normed * (self.weight.float() + self.offset)).to(x.dtype)


class HeadsNorm(nn.Module):
    """Layer or RMS norm of q or k, with a weight of its own for each normalized number.

    Args:
        width: H for a weight that all heads share, N * H to normalize them together.
    """

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = spec.norm_eps
        self.offset = spec.norm_offset
        self.over_width = spec.qk_norm == "width"
        self.normalize = F.layer_norm if spec.norm == "layer" else F.rms_norm

    def forward(self, x_BTNH: Tensor) -> Tensor:
        """Returns (B, T, N, H)."""
        x = x_BTNH.flatten(-2) if self.over_width else x_BTNH
        normed = self.normalize(x, x.shape[-1:], eps=self.eps) * (self.weight + self.offset)
        return normed.view_as(x_BTNH)


class PerHeadNorm(nn.ModuleList):
    """As `HeadsNorm` over each head, with N modules that hold one head's weight each (StableLM 2)."""

    def __init__(self, spec: ModelSpec, n_heads: int) -> None:
        super().__init__(HeadsNorm(spec, spec.d_head) for _ in range(n_heads))
        self.eps = spec.norm_eps
        self.offset = spec.norm_offset
        self.normalize = F.layer_norm if spec.norm == "layer" else F.rms_norm

    def forward(self, x_BTNH: Tensor) -> Tensor:
        """Returns (B, T, N, H)."""
        weight_NH = torch.stack([head.get_parameter("weight") for head in self])
        return self.normalize(x_BTNH, x_BTNH.shape[-1:], eps=self.eps) * (weight_NH + self.offset)


def build_norm(spec: ModelSpec) -> nn.Module:
    """A normalization layer over the model width."""
    if spec.norm == "layer":
        return nn.LayerNorm(spec.d_model, spec.norm_eps, elementwise_affine=spec.norm_affine, bias=spec.norm_bias)
    if spec.norm_offset:
        return OffsetRMSNorm(spec.d_model, eps=spec.norm_eps, offset=spec.norm_offset)
    return RMSNorm(spec.d_model, eps=spec.norm_eps, elementwise_affine=spec.norm_affine)


def build_qk_norm(spec: ModelSpec, n_heads: int) -> nn.Module:
    """What normalizes the ``n_heads`` heads of q or of k."""
    if spec.qk_norm == "none":
        return nn.Identity()
    if spec.qk_norm == "heads":
        return PerHeadNorm(spec, n_heads)
    return HeadsNorm(spec, n_heads * spec.d_head if spec.qk_norm == "width" else spec.d_head)
