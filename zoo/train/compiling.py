"""Compiled blocks: one compilation serves all layers and all lengths."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from zoo.models.attention import Attention
from zoo.train.activation_checkpointing import again, blocks_of, replace_forward, runs_again


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
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
        once = runs_again(block)
        compiled = torch.compile(once or block.forward, dynamic=True, backend=backend)
        # A graph that breaks can not be computed again from inside, so checkpointing goes around it.
        replace_forward(block, compiled if once is None else partial(again, compiled))
