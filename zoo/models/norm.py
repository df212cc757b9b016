"""Normalization over the model width. Both compute their statistics in float32, whatever the input's dtype."""

from __future__ import annotations

from torch import nn

from zoo.spec import ModelSpec


def build_norm(spec: ModelSpec) -> nn.LayerNorm | nn.RMSNorm:
    """The normalization layer of a spec."""
    if spec.norm == "rms":
        return nn.RMSNorm(spec.d_model, eps=spec.norm_eps)
    return nn.LayerNorm(spec.d_model, eps=spec.norm_eps, bias=spec.norm_bias)
