"""What zoo imports for ``--precision transformer-engine``: this fails, with reason and remedy, where it can not run."""

from __future__ import annotations

import torch

from zoo_transformer_engine.engine import TransformerEngine
from zoo_transformer_engine.install import check

check()

BFLOAT16 = TransformerEngine(
    name="transformer-engine", param_dtype=torch.bfloat16, inference="bf16-true", recomputes=False
)
FLOAT16 = TransformerEngine(
    name="transformer-engine-float16",
    param_dtype=torch.float32,
    autocast_dtype=torch.float16,
    inference="16-true",
    recomputes=False,
)
"""float16 weights would lose small updates, and small gradients be zero: as for 16-mixed, the loss is scaled."""
