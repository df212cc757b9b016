"""Random initial weights of a decoder.

| parameter                                   | distribution                                              |
|---------------------------------------------|-----------------------------------------------------------|
| embeddings, linear weights                  | normal, std ``init_std``                                  |
| ``attn.out`` and ``mlp.down`` weights       | normal, std ``init_std / sqrt(2 n_layers)`` (GPT-2, 2.3)  |
| norm weights                                | 1 (stored: 1 - ``norm_offset``)                           |
| biases                                      | 0                                                         |
"""

from __future__ import annotations

import math

import torch
from torch import nn

from zoo.models.gpt import GPT


@torch.no_grad()
def init_weights(model: GPT, generator: torch.Generator | None = None) -> None:
    """Set every parameter of ``model`` in place, by the table above."""
    std = model.spec.init_std
    residual_std = std / math.sqrt(2 * model.spec.n_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0 - model.spec.norm_offset)
        else:
            writes_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=residual_std if writes_residual else std, generator=generator)
