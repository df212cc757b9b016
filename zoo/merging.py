"""An adapter merged into the weights of its model, written as a plain model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.adapting import default_registry, find_adapter, load_adapter
from zoo.attention.base import AttentionRequest, choose_attention
from zoo.convert.adapter_names import FamilyNames
from zoo.convert.base import Checkpoint
from zoo.convert.export import Exported, export_model
from zoo.convert.from_model import from_model
from zoo.convert.load import load_any
from zoo.errors import InputError
from zoo.models.decoder import decoder_of
from zoo.registry import Registry
from zoo.text.prompts import read_prompt_style

_TOKENS = 64
"""On which merged and unmerged are compared."""


@dataclass(frozen=True)
class Merged:
    """What was written, and how far merging has moved the logits."""

    exported: Exported
    dtype: torch.dtype
    """Of the weights."""
    difference: float
    """Largest, between a logit of the merged model and of the model with the adapter beside it."""
    largest: float
    """The largest logit."""
    same: int
    """Positions whose likeliest token is the same."""
    positions: int
    notes: tuple[str, ...] = ()
    """What was assumed about the adapter."""


def merge_adapter(
    checkpoint: Checkpoint,
    adapter: str | Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    device: torch.device | str = "cpu",
    registry: Registry | None = None,
) -> Merged:
    """Write ``checkpoint`` with an adapter in its weights, and its prompt style, as a Hugging Face directory.

    Args:
        adapter: as `zoo.load_adapter` takes it.
        dtype: of the weights; by default the stored one, or bfloat16 where that is quantized.
        dequantize: merge into the values that quantized weights stand for.

    Raises:
        InputError: the weights are quantized, the adapter can not be merged or does not fit, the destination is taken.
    """
    registry = registry or default_registry()
    _check(checkpoint, destination, dequantize)
    stored = checkpoint.tensors.dtype(next(iter(checkpoint.located())))
    dtype = dtype or (torch.bfloat16 if checkpoint.quantized else stored)
    request = AttentionRequest.of(checkpoint.spec, device=torch.device(device).type, dtype=dtype)
    backend = choose_attention("auto", request, registry).backend
    model = load_any(checkpoint, backend, dtype=dtype, device=device)
    names = FamilyNames(checkpoint.family.keys, checkpoint.spec, checkpoint.family.model_type)
    handle = load_adapter(model, adapter, names=names, registry=registry)
    style = read_prompt_style(find_adapter(adapter)[0])
    if style is not None:
        checkpoint = checkpoint.with_style(style)
    apart = _logits(model, checkpoint)
    handle.merge()
    merged = _logits(model, checkpoint)
    exported = export_model(from_model(model, checkpoint), destination)
    if style is not None:
        style.save(destination)
    same = int((apart.argmax(-1) == merged.argmax(-1)).sum())
    difference = (apart - merged).abs().max().item()
    return Merged(exported, dtype, difference, apart.abs().max().item(), same, apart.shape[0], tuple(handle.notes))


def _check(checkpoint: Checkpoint, destination: Path, dequantize: bool) -> None:
    """What can be known to fail before weights are loaded."""
    if checkpoint.quantized and not dequantize:
        raise InputError(
            f"{checkpoint.path} holds quantized weights, and an update is finer than their steps: merged into them, "
            "most of it would be lost.",
            fix="--dequantize merges into float weights, as large as those of an unquantized model.",
        )
    if destination.exists() and (destination.is_file() or any(destination.iterdir())):
        raise InputError(f"{destination} exists already.", fix="Choose another name, or remove it.")


@torch.no_grad()
def _logits(model: nn.Module, checkpoint: Checkpoint) -> Tensor:
    """Logits (T, V) of random tokens, the same each time, float32 on the CPU."""
    random, spec = torch.Generator().manual_seed(0), checkpoint.spec
    decoder = decoder_of(model, spec)
    tokens_BT = torch.randint(spec.vocab_size, (1, min(_TOKENS, spec.max_seq_len)), generator=random)
    return decoder(tokens_BT.to(decoder.device))[0].float().cpu()
