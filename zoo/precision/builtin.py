"""Precisions with one dtype, and mixed ones: weights in float32, matrix products in half precision."""

from __future__ import annotations

import torch

from zoo.precision.base import Precision

FP32_TRUE = Precision(name="32-true", param_dtype=torch.float32)
BF16_TRUE = Precision(name="bf16-true", param_dtype=torch.bfloat16)
FP16_TRUE = Precision(name="16-true", param_dtype=torch.float16)
BF16_MIXED = Precision(
    name="bf16-mixed", param_dtype=torch.float32, autocast_dtype=torch.bfloat16, inference="bf16-true"
)
FP16_MIXED = Precision(name="16-mixed", param_dtype=torch.float32, autocast_dtype=torch.float16, inference="16-true")
