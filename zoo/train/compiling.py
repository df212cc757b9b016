"""Compiled blocks: one compilation serves all layers and all lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.models.attention import Attention
from zoo.train.activation_checkpointing import blocks_of


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of a model in place, at its first call: half a minute, unless a cache on disk has it.

    Names and the state dict stay as they are. What attention backends do is left out: their own kernels are faster than
    what is compiled of them, and rows that share tokens would make every batch another program.

    Raises:
        InputError: the model has no `torch.nn.ModuleList` of blocks.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.__dict__["attended"] = torch.compiler.disable(module.attended)
    for block in blocks_of(model):
        compiled: Any = block
        compiled.compile(dynamic=True)
