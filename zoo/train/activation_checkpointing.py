"""Activation checkpointing (arXiv 1604.06174): what a part of the model keeps for the backward pass is computed again.

``block`` keeps nothing but the input of each block, for about a third more time. ``selective`` does so with the
feed-forward layer of each block only: they keep most, and attention, whose cost grows with the length, runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import InputError

Mode = Literal["none", "block", "selective"]

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "ff")
"""What the field calls it."""


def set_activation_checkpointing(model: nn.Module, mode: Mode) -> int:
    """Have the blocks of a model compute activations again; whatever was set before is undone.

    Only ``forward`` of single modules is replaced: names, hooks, adapters and the state dict stay as they are. Random
    numbers are the same the second time. Hooks inside of what is computed again run twice. Passes without gradients are
    not affected.

    Args:
        model: a `GPT`, or any module that holds its blocks in a `torch.nn.ModuleList`.

    Returns:
        How many modules are computed again.

    Raises:
        InputError: it has no such list, or ``selective`` and the blocks have no feed-forward layer with a known name.
    """
    for module in model.modules():
        if (once := runs_again(module)) is not None:
            del module.__dict__["forward"]
            replace_forward(module, once)
    if mode == "none":
        return 0
    blocks = list(blocks_of(model))
    chosen = blocks if mode == "block" else [_feed_forward(block) for block in blocks]
    for module in chosen:
        replace_forward(module, partial(again, module.forward))
    return len(chosen)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have one module compute with another ``forward``; with its own, if it is that of its class."""
    if getattr(forward, "__self__", None) is not module:
        module.__dict__["forward"] = forward


def runs_again(module: nn.Module) -> Callable[..., Any] | None:
    """What a module computes again, if it does."""
    forward = module.__dict__.get("forward")
    return forward.args[0] if isinstance(forward, partial) and forward.func is again else None


def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``forward`` computes; it keeps its arguments alone, and runs again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most of the parameters.

    Raises:
        InputError: there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} holds no torch.nn.ModuleList of blocks.",
            fix="Keep its blocks in one, or take activation_checkpointing: none, and no compile.",
        )
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def _feed_forward(block: nn.Module) -> nn.Module:
    for name in _FEED_FORWARD:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module) and type(module).forward is not nn.Module.forward:
            return module
    raise InputError(
        f"{type(block).__name__} has no feed-forward layer named {', '.join(_FEED_FORWARD[:-1])} or "
        f"{_FEED_FORWARD[-1]}, so selective checkpointing does not know what to choose.",
        fix="Take activation_checkpointing: block.",
    )
