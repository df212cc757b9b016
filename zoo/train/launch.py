"""Starts the processes of a run, and shards what each holds, through Lightning Fabric."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.plugins.precision import Precision as LeaveDtypes
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn

from zoo.adapters.base import Adapted, Prompts
from zoo.errors import UnavailableError
from zoo.precision.base import Precision
from zoo.train.recipe import Recipe

ACCELERATORS = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}


def make_fabric(recipe: Recipe, device: torch.device, precision: Precision) -> Fabric:
    """Fabric for the recipe's processes; ``launch()`` starts them.

    zoo's precisions decide about dtypes and layers; Fabric adds autocast for the mixed ones, and converts nothing.

    Raises:
        UnavailableError: the strategy can not be used here.
    """
    world = recipe.world_size
    strategy: Any = "auto" if world == 1 else "ddp"
    if recipe.strategy == "deepspeed":
        raise UnavailableError(
            "strategy 'deepspeed' can not be used: its checkpoints can not be verified by zoo's store.",
            fix="Take --strategy fsdp, which shards weights, gradients and optimizer as ZeRO 3 does.",
        )
    if recipe.strategy == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=world, tensor_parallel_size=1)
    elif recipe.strategy == "ddp":
        strategy = "ddp"
    return Fabric(
        accelerator=ACCELERATORS[device.type],
        devices=_devices(recipe, device),
        num_nodes=recipe.num_nodes,
        strategy=strategy,
        plugins=[_plugin(precision, device)],
    )


def _devices(recipe: Recipe, device: torch.device) -> int | list[int]:
    if device.index is None:
        return recipe.devices
    if recipe.devices > 1:
        raise UnavailableError(f"device {device} is one, and devices is {recipe.devices}.", fix="Take --device cuda.")
    return [device.index]


def _plugin(precision: Precision, device: torch.device) -> LeaveDtypes:
    if precision.autocast_dtype is None:
        plugin: _Plain | _Mixed = _Plain()
    else:
        scaler = torch.amp.GradScaler(device.type) if precision.autocast_dtype == torch.float16 else None
        plugin = _Mixed("16-mixed" if scaler else "bf16-mixed", device.type, scaler)
    plugin.chosen = precision
    return plugin


class _Plain(LeaveDtypes):  # type: ignore[misc]
    """Changes no dtype; the forward pass runs in the precision's own context."""

    chosen: Precision

    def forward_context(self) -> AbstractContextManager[None]:
        return self.chosen.context()


class _Mixed(MixedPrecision):  # type: ignore[misc]
    """Autocast, and inside of it the precision's own context."""

    chosen: Precision

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with super().forward_context(), self.chosen.context():
            yield


def shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard every block, and then the rest, as units that are gathered one at a time.

    Parameters of a unit share a dtype: adapters in float32 on a base in bfloat16 are units of their own.
    """
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    dtypes = {p.dtype for p in module.parameters()}
    if len(dtypes) > 1:
        for part in _parts(module):
            fully_shard(part, mesh=data_parallel)
    for block in _blocks(module):
        fully_shard(block, mesh=data_parallel)
    fully_shard(module, mesh=data_parallel)
    return module


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The items of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.modules():
        if isinstance(child, Adapted | Prompts):
            yield from child.parts.values()
