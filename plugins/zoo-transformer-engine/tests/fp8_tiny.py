"""A GPT of a few layers, and text that it can learn only so well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.train.optim import build_optimizer

VOCAB, LENGTH = 64, 32


def gpt(**overrides: Any) -> nn.Module:
    """bfloat16, in training mode."""
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ffn": 128, "vocab_size": VOCAB, "max_seq_len": LENGTH}
    still = {"embed_dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0}
    model: nn.Module = zoo.build("gpt2", seed=0, **(shape | still | overrides))
    return model.bfloat16().train()


def chain(n_rows: int, seed: int) -> Tensor:
    """Rows of a Markov chain whose next token is one of four."""
    following = torch.randint(VOCAB, (VOCAB, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (n_rows, 1), generator=generator)
    for _ in range(LENGTH):
        choice = torch.randint(4, (n_rows, 1), generator=generator)
        tokens = torch.cat((tokens, following[tokens[:, -1]].gather(1, choice)), dim=1)
    return tokens


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_of(model: nn.Module, lr: float = 3e-3) -> torch.optim.Optimizer:
    return build_optimizer(model, lr=lr, weight_decay=0.0)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, loss: Callable[..., Tensor] = loss_of
) -> list[float]:
    """One step for each number, on the rows of that number."""
    losses = []
    for step in steps:
        value = loss(model, chain(8, seed=1 + step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses
