"""Tiny decoders with every parameter random, batches for them, and the loss as the formula says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attention.eager import Eager
from zoo.attention.sdpa import SDPA
from zoo.data.batches import IGNORED, Batch
from zoo.models.gpt import GPT
from zoo.spec import ModelSpec

VOCAB = 97
LLAMA: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 48,
    "n_heads": 6,
    "n_kv_heads": 2,
    "d_ffn": 80,
    "vocab_size": VOCAB,
    "max_seq_len": 160,
    "norm": "rms",
    "norm_eps": 1e-5,
    "mlp": "gated",
    "activation": "silu",
    "rope": {"base": 1000.0},
}
GPT2: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 48,
    "n_heads": 6,
    "vocab_size": VOCAB,
    "max_seq_len": 160,
    "norm": "layer",
    "norm_eps": 1e-5,
    "norm_bias": True,
    "qkv_bias": True,
    "attn_out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}
SPECS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "head-bias": LLAMA | {"head_bias": True},
    "tied": LLAMA | {"tie_embeddings": True},
    "capped": LLAMA | {"head_softcap": 2.0, "attn_softcap": 1.5, "norm_offset": 1.0, "embed_scale": 3.0},
    "window": LLAMA | {"window": 5, "full_attention_layers": [1]},
    "parallel": GPT2 | {"block": "parallel", "tie_embeddings": False, "head_bias": True},
}


def tiny(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> GPT:
    """A decoder of one of `SPECS`, in training mode."""
    spec = ModelSpec.from_dict(SPECS[name] | changes)
    model = GPT(spec, SDPA() if spec.attn_softcap is None else Eager())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            center = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).train()


def batch_of(samples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """A padded batch of prompts and answers: the answers are learnt."""
    width = max(len(prompt) + len(answer) for prompt, answer in samples) - 1
    tokens_BT = torch.zeros(len(samples), width, dtype=torch.long)
    targets_BT = torch.full_like(tokens_BT, IGNORED)
    for b, (prompt, answer) in enumerate(samples):
        ids = torch.tensor([*prompt, *answer])
        tokens_BT[b, : len(ids) - 1] = ids[:-1]
        targets_BT[b, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    n_tokens = sum(len(prompt) + len(answer) - 1 for prompt, answer in samples)
    return Batch(tokens_BT, targets_BT, None, None, n_tokens, int((targets_BT != IGNORED).sum()))


def random_ids(length: int, *, seed: int, vocab: int = VOCAB) -> list[int]:
    """Token ids."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def instructions(n_rows: int = 5, n_common: int = 20, *, n_more: int = 6) -> Batch:
    """Rows that begin alike and have different lengths."""
    common = random_ids(n_common, seed=1)
    rows = range(n_rows)
    return batch_of(
        [(common + random_ids(3 + n_more * b, seed=10 + b), random_ids(4 + 2 * b, seed=50 + b)) for b in rows]
    )


def formula(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    """Cross-entropy over all logits of a batch as it is, summed, float32."""
    logits_BTV = model(batch.tokens_BT, **options).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every trainable parameter; they are taken off the model."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found
