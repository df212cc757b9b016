"""nanoGPT's and minGPT's models after their published definitions, with every parameter random, and their files."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHARACTERS = "\n !'abcdefghijklmno?é日"
"""The vocabulary of the models with characters: 22 of them."""


class Norm(nn.Module):
    """Layer norm, epsilon 1e-5, with or without bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class SelfAttention(nn.Module):
    """Causal attention with one matrix for q, k and v; ``mask`` keeps the causal mask as the buffer ``bias``."""

    def __init__(self, width: int, n_heads: int, block_size: int, bias: bool, mask: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        if mask:
            self.register_buffer("bias", torch.ones(block_size, block_size).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.n_heads, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=2))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.n_heads)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden, -math.inf).softmax(3) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def tanh_gelu(x: Tensor) -> Tensor:
    """minGPT's NewGELU, and nanoGPT's before May 2023."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: Tensor) -> Tensor:
    """nanoGPT's nn.GELU, by its definition."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class KarpathyGPT(nn.Module):
    """Both of them: ``tied`` and ``tanh=False`` is nanoGPT, the opposite with a mask is minGPT."""

    def __init__(
        self, sizes: dict[str, int], *, bias: bool = True, tied: bool = True, tanh: bool = False, mask: bool = False
    ) -> None:
        super().__init__()
        n_embd, vocab_size, block_size = sizes["n_embd"], sizes["vocab_size"], sizes["block_size"]
        self.activation = tanh_gelu if tanh else exact_gelu

        def block() -> nn.ModuleDict:
            up, down = nn.Linear(n_embd, 4 * n_embd, bias=bias), nn.Linear(4 * n_embd, n_embd, bias=bias)
            attention = SelfAttention(n_embd, sizes["n_head"], block_size, bias, mask)
            mlp = nn.ModuleDict({"c_fc": up, "c_proj": down})
            return nn.ModuleDict(
                {"ln_1": Norm(n_embd, bias), "attn": attention, "ln_2": Norm(n_embd, bias), "mlp": mlp}
            )

        embeddings = {"wte": nn.Embedding(vocab_size, n_embd), "wpe": nn.Embedding(block_size, n_embd)}
        blocks = nn.ModuleList(block() for _ in range(sizes["n_layer"]))
        self.transformer = nn.ModuleDict({**embeddings, "h": blocks, "ln_f": Norm(n_embd, bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                center = 1.0 if "ln_" in name and "weight" in name else 0.0
                parameter.copy_(center + 0.3 * torch.randn(parameter.shape))

    def forward(self, ids: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1]))
        for block in parts["h"]:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"]["c_proj"](self.activation(block["mlp"]["c_fc"](block["ln_2"](x))))
        return self.lm_head(parts["ln_f"](x))


SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": len(CHARACTERS)}


def save_nanogpt(path: Path, model: KarpathyGPT, *, prefix: str = "", **model_args: Any) -> dict[str, Any]:
    """What train.py saves, with a real optimizer; returns it."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": SIZES | {"bias": True, "dropout": 0.2} | model_args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": True, "init_from": "scratch"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return checkpoint


def meta() -> dict[str, Any]:
    """What nanoGPT's prepare.py pickles for a vocabulary of characters."""
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    return {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}


def save_meta(path: Path, **changes: Any) -> None:
    """meta.pkl, or meta.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = meta() | changes
    path.write_bytes(json.dumps(content).encode() if path.suffix == ".json" else pickle.dumps(content))


def save_mingpt(directory: Path, model: KarpathyGPT, **model_config: Any) -> None:
    """model.pt and config.json, as minGPT's projects write them."""
    torch.save(model.state_dict(), directory / "model.pt")
    sizes = dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size", "block_size"))
    part = {"model_type": "gpt-nano", **sizes, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    whole = {
        "system": {"seed": 1},
        "data": {"block_size": 128},
        "model": part | model_config,
        "trainer": {"device": "auto"},
    }
    (directory / "config.json").write_text(json.dumps(whole, indent=4))
