"""Trains a small model with the store: ``python sharded_worker.py PLAN`` (JSON). Prints the losses, on rank 0."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.store.store import CheckpointStore
from zoo.train.launch import shard

ROWS = 6  # of a batch; divides among 1, 2 and 3 ranks


class Net(nn.Module):
    """Blocks in a list, a buffer, sizes that do not divide evenly, and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Dropout(dropout)) for _ in range(3))
        self.head = nn.Linear(7, 11)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits: Tensor = self.head(x * self.scale)
        return logits


def main(plan: dict[str, Any]) -> None:
    world, kind = plan["world"], plan.get("kind", "fsdp")
    strategy: Any = "auto" if kind == "plain" else "ddp"
    if kind == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=world, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    model: Any = fabric.setup_module(Net(plan["dropout"]))
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    torch.manual_seed(1 + fabric.global_rank)
    with CheckpointStore(plan["store"], fabric, background=plan.get("background", False)) as store:
        state = {"model": model, "optimizer": optimizer, "step": 0}
        if plan.get("resume"):
            loaded = store.load(state, other_world_size=True)
            assert loaded.step == state["step"]
        losses = []
        for step in range(state["step"], plan["until"]):
            losses.append(one_step(fabric, model, optimizer, step))
            state["step"] = step + 1
            store.poll()
            if step + 1 == plan.get("save_at"):
                store.save(step + 1, state)
            if step + 1 == plan.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)
    if fabric.global_rank == 0:
        Path(plan["out"]).write_text(json.dumps(losses))


def one_step(fabric: Fabric, model: Any, optimizer: Any, step: int) -> float:
    """The mean over a batch that is the same however many ranks share it."""
    tokens = torch.randint(0, 11, (ROWS, 5), generator=torch.Generator().manual_seed(step))
    mine = tokens.chunk(fabric.world_size)[fabric.global_rank]
    loss = F.cross_entropy(model(mine).flatten(0, 1), mine.roll(1, 1).flatten())
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(fabric.all_reduce(loss.detach(), reduce_op="mean"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
