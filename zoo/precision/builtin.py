"""Precisions in which weights and arithmetic share one dtype."""

from __future__ import annotations

import torch

from zoo.precision.base import Precision

FP32_TRUE = Precision(name="32-true", param_dtype=torch.float32)
BF16_TRUE = Precision(name="bf16-true", param_dtype=torch.bfloat16)
FP16_TRUE = Precision(name="16-true", param_dtype=torch.float16)
