"""The model of a run: loaded or built, with what the recipe trains of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.adapters.attach import AttachedAdapter
from zoo.api import choose_device, converted, load
from zoo.attention.base import AttentionRequest, choose_attention
from zoo.convert.from_model import fresh_checkpoint
from zoo.convert.hf_writer import hf_config
from zoo.errors import InputError
from zoo.families.base import Family
from zoo.language_model import LanguageModel
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.precision.base import choose_precision
from zoo.registry import Registry
from zoo.spec import ModelSpec
from zoo.text.tokenizer import Tokenizer
from zoo.train.recipe import Recipe

NAME = "trained"
"""Of the adapter that a run trains."""


@dataclass(frozen=True)
class Trained:
    """A model, and the handle on what is trained of it."""

    lm: LanguageModel
    handle: AttachedAdapter


def load_trained(recipe: Recipe, registry: Registry, say: Callable[[str], None]) -> Trained:
    """The model that a finetuning recipe names, with its adapter.

    Raises:
        InputError, UnavailableError: something in the recipe does not fit the model or this machine.
    """
    lm = load(
        recipe.model,
        precision=recipe.precision.use,
        precision_options=recipe.precision.options,
        attention=recipe.attention,
        device=recipe.device,
        quantize=recipe.quantize,
        training=True,
        registry=registry,
        report=say,
    )
    return _adapted(lm, recipe)


def build_trained(recipe: Recipe, tokenizer: Tokenizer, registry: Registry) -> Trained:
    """The model that a pretraining recipe names, with random weights, and the vocabulary of the tokenizer.

    Raises:
        InputError, UnavailableError: as `load_trained`.
    """
    entry = registry.model(recipe.model)
    family: Family = registry.load("family", entry.family)
    values = {**entry.spec_values, "vocab_size": _padded(tokenizer.vocab_size), **recipe.spec}
    if recipe.max_seq_len is not None:
        values["max_seq_len"] = recipe.max_seq_len
    spec = ModelSpec.from_dict(values)
    if spec.vocab_size < tokenizer.vocab_size:
        raise InputError(f"spec.vocab_size {spec.vocab_size} is below the tokenizer's {tokenizer.vocab_size}.")
    device = choose_device(recipe.device)
    precision = choose_precision(
        recipe.precision.use if recipe.precision.use != "auto" else "32-true",
        stored=torch.float32,
        quantized=False,
        device=device.type,
        registry=registry,
        training=True,
        options=recipe.precision.options,
    )
    checkpoint = fresh_checkpoint(family, spec, Path(recipe.out) / "model", tokenizer)
    hf_config(checkpoint, precision.param_dtype)  # what can not be written is refused before it is trained
    generator = torch.Generator().manual_seed(recipe.seed)
    if family.build is not None:
        torch.manual_seed(recipe.seed)
        module = family.build(spec).to(device=device, dtype=precision.param_dtype)
        lm = LanguageModel(module, checkpoint, precision.name, "own", None, device, [])
        return _adapted(converted(lm, precision), recipe)
    request = AttentionRequest.of(spec, device=device.type, dtype=precision.param_dtype, training=True)
    chosen = choose_attention(recipe.attention, request, registry)
    model = GPT(spec, chosen.backend)
    init_weights(model, generator)
    model.to(device=device, dtype=precision.param_dtype)
    lm = LanguageModel(model, checkpoint, precision.name, chosen.name, chosen.backend, device, [])
    return _adapted(converted(lm, precision), recipe)


def gathered(trained: Trained) -> dict[str, Tensor]:
    """What is trained, whole on every rank; all of them call it."""
    state = trained.handle.state_dict()
    return {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t for name, t in state.items()}


def _padded(vocab_size: int) -> int:
    """Large vocabularies are rounded up, for the sake of matrix products; small ones keep their size."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64


def _adapted(lm: LanguageModel, recipe: Recipe) -> Trained:
    torch.manual_seed(recipe.seed)
    return Trained(lm, lm.adapt(recipe.adapter.use, name=NAME, **recipe.adapter.options))
