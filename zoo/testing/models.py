"""Tiny models for contracts: a spec cut down with its mechanisms kept, every parameter random."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.attention.eager import Eager
from zoo.convert.base import Checkpoint
from zoo.convert.from_model import fresh_checkpoint, from_model
from zoo.families.base import Family
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.spec import ModelSpec, RopeSpec
from zoo.text.new_tokenizers import train_bpe
from zoo.text.tokenizer import Tokenizer

N_LAYERS, N_HEADS, D_HEAD, VOCAB, CONTEXT, WINDOW = 2, 4, 16, 320, 32, 8


def shrunk(spec: ModelSpec) -> ModelSpec:
    """The same mechanisms in a model of two layers, with room for the vocabulary of bytes."""
    width = N_HEADS * D_HEAD
    d_model = width if spec.d_model == spec.n_heads * spec.d_head else 3 * D_HEAD
    by_width = spec.embed_scale is not None and abs(spec.embed_scale - spec.d_model**0.5) < 0.5
    grouped = 1 if spec.n_kv_heads == 1 else N_HEADS if spec.n_kv_heads == spec.n_heads else 2
    return replace(
        spec,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        n_kv_heads=grouped,
        d_head=D_HEAD,
        d_model=d_model,
        embed_scale=d_model**0.5 if by_width else spec.embed_scale,
        d_ffn=4 * d_model if spec.d_ffn == 4 * spec.d_model else 5 * D_HEAD,
        vocab_size=VOCAB,
        max_seq_len=CONTEXT,
        rope=None if spec.rope is None else _shrunk_rope(spec.rope, spec.d_head),
        window=None if spec.window is None else WINDOW,
        full_attention_layers=tuple(i for i in spec.full_attention_layers if i < N_LAYERS),
        unrotated_layers=tuple(i for i in spec.unrotated_layers if i < N_LAYERS),
    )


def _shrunk_rope(rope: RopeSpec, d_head: int) -> RopeSpec:
    n_dims = max(2, rope.n_dims * D_HEAD // d_head // 2 * 2)
    scaling = rope.scaling
    if scaling is not None and scaling.kind == "longrope":
        half = n_dims // 2
        factors = scaling.short_factors[:half], scaling.long_factors[:half]
        scaling = replace(scaling, short_factors=factors[0], long_factors=factors[1], original_max_seq_len=CONTEXT // 2)
    return replace(rope, n_dims=n_dims, scaling=scaling)


def random_model(family: Family, spec: ModelSpec) -> nn.Module:
    """A model of the family in evaluation mode. Zero biases and unit norms would hide mistakes: all is random."""
    torch.manual_seed(0)
    if family.build is not None:
        model = family.build(spec)
    else:
        model = GPT(spec, Eager())
        init_weights(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def checkpoint_of(family: Family, model: nn.Module, spec: ModelSpec, directory: Path) -> Checkpoint:
    """A model in memory as a checkpoint with a tokenizer, to be written."""
    return from_model(model, fresh_checkpoint(family, spec, directory, small_tokenizer()))


@cache
def small_tokenizer() -> Tokenizer:
    """Bytes and a few pairs of them, as GPT-2's."""
    return train_bpe(["Once upon a time there was a tokenizer, and it was small."], VOCAB - 40)


def some_tokens(length: int = 12) -> Tensor:
    """Ids (2, T), always the same."""
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(2))
