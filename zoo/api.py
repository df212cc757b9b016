"""The Python API: load a model and use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.adapting import default_registry, find_adapter
from zoo.attention.base import AttentionRequest, choose_attention
from zoo.convert.base import Checkpoint
from zoo.convert.export import Exported, export_model
from zoo.convert.from_model import fresh_checkpoint, from_model
from zoo.convert.load import load_model, load_own, open_checkpoint
from zoo.convert.load_quantized import load_quantized
from zoo.errors import InputError, UnavailableError
from zoo.families.base import Family
from zoo.generate.compile import CompiledDecoding, require_compiler
from zoo.language_model import LanguageModel
from zoo.models.attention import Attend
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.precision.base import NO_OPTIONS, Precision, choose_precision
from zoo.precision.quantization import Quantizer, choose_quantizer
from zoo.registry import Registry
from zoo.sources.base import FetchOptions
from zoo.sources.resolve import resolve_model
from zoo.spec import ModelSpec
from zoo.store.locate import trained_directory
from zoo.text.prompts import read_prompt_style
from zoo.text.tokenizer import Tokenizer

__all__ = ["LanguageModel", "build", "checkpoints_directory", "choose_device", "load", "save"]


def checkpoints_directory() -> Path:
    """Where weights are kept: ``ZOO_CHECKPOINTS``, or ``checkpoints`` in the working directory."""
    return Path(os.environ.get("ZOO_CHECKPOINTS", "checkpoints"))


def load(
    model: str | Path,
    *,
    precision: str = "auto",
    precision_options: Mapping[str, Any] = NO_OPTIONS,
    attention: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    compile: bool = False,  # noqa: A002 - as torch calls it
    adapters: Mapping[str, str | Path] | Sequence[str | Path] = (),
    training: bool = False,
    fetch: FetchOptions | None = None,
    registry: Registry | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """Load a model.

    Args:
        model: a registry name, a model directory, a run or a step of one, a GGUF file, or a source such as
            ``hf:org/name``. What is not there yet is downloaded to `checkpoints_directory`.
        precision: a registered precision; ``auto`` takes the stored one where the device computes in it.
        precision_options: as ``zoo show precision NAME`` lists them.
        attention: a registered backend; ``auto`` takes the first that can serve the model.
        device: ``auto`` (cuda, mps or cpu), or a torch device.
        quantize: a registered quantizer (``int8``, ``int4``); weights are quantized as they are read. By default the
            one that the directory was written for, if any.
        compile: decode with a compiled model; the first token then takes about a minute. Adapters are merged for it.
        adapters: adapter directories, PEFT's or zoo's, or runs, that apply one after the other. With names (a mapping),
            ``generate`` can choose among them.
        training: whether it will be trained: what can not do that is refused.
        fetch: revision, token and offline mode for downloads.
        report: called with a line when something takes long.

    Raises:
        InputError: the model is unknown or damaged, or its config is not understood.
        UnavailableError: a choice can not be used on this machine.
    """
    registry = registry or default_registry()
    checkpoint = _open(model, fetch or FetchOptions(), registry, report)
    target = choose_device(device)
    quantizer = _choose_quantizer(quantize, checkpoint, target, registry)
    stored = checkpoint.tensors.dtype(next(iter(checkpoint.located())))
    is_quantized = checkpoint.quantized or quantizer is not None
    asked: dict[str, Any] = {"training": training, "options": precision_options, "registry": registry}
    chosen = choose_precision(precision, stored=stored, quantized=is_quantized, device=target.type, **asked)
    named = _named(adapters)
    if checkpoint.family.build is not None:
        _refuse_for_own(checkpoint.family, attention=attention != "auto", quantize=bool(quantizer), compiled=compile)
        own = _load_own(checkpoint, chosen, target)
        return _with_adapters(converted(own, chosen) if training else own, named)
    request = AttentionRequest.of(checkpoint.spec, device=target.type, dtype=chosen.param_dtype, training=training)
    backend = choose_attention(attention, _compilable(request) if compile else request, registry)
    notes = [f"{name} attention was not possible: {'; '.join(why)}" for name, why in backend.rejected.items()]
    loaded = _load_decoder(checkpoint, backend.backend, quantizer, chosen.param_dtype, target)
    lm = LanguageModel(loaded, checkpoint, chosen.name, backend.name, backend.backend, target, notes)
    lm.quantized = quantizer.name if quantizer else None
    if compile:
        return _compiled(lm, named, report)
    return _with_adapters(converted(lm, chosen) if training else lm, named)


def _compilable(request: AttentionRequest) -> AttentionRequest:
    """What compiled decoding asks of a backend besides."""
    require_compiler()
    return replace(request, mask_features=request.mask_features | {"queries"})


def converted(lm: LanguageModel, precision: Precision) -> LanguageModel:
    """The model with its layers as a precision trains them. Adapters come afterwards, around those layers.

    Raises:
        InputError: no layer can be trained so.
    """
    lm.converted = precision.convert(lm.model)
    return lm


def _compiled(lm: LanguageModel, adapters: Mapping[str, str | Path], report: Callable[[str], None]) -> LanguageModel:
    for adapter in _with_adapters(lm, adapters).adapters:
        adapter.merge()
    lm.step = CompiledDecoding(lm.model, report=report)
    return lm


def _load_own(checkpoint: Checkpoint, precision: Precision, device: torch.device) -> LanguageModel:
    model = load_own(checkpoint, dtype=precision.param_dtype, device=device)
    return LanguageModel(model, checkpoint, precision.name, "own", None, device, [])


def _load_decoder(
    checkpoint: Checkpoint, attend: Attend, quantizer: Quantizer | None, dtype: torch.dtype, device: torch.device
) -> GPT:
    if quantizer is None:
        return load_model(checkpoint, attend, dtype=dtype, device=device)
    return load_quantized(checkpoint, attend, quantizer, dtype=dtype, device=device)


def _named(adapters: Mapping[str, str | Path] | Sequence[str | Path]) -> Mapping[str, str | Path]:
    """Adapter directories by name, each checked before any work."""
    named = adapters if isinstance(adapters, Mapping) else {f"adapter-{i}": path for i, path in enumerate(adapters)}
    for directory in named.values():
        find_adapter(directory)
    return named


def _with_adapters(lm: LanguageModel, directories: Mapping[str, str | Path]) -> LanguageModel:
    lm.style = read_prompt_style(lm.checkpoint.directory)
    for name, directory in directories.items():
        lm.adapters.append(lm.load_adapter(directory, name=name))
    return lm


def _refuse_for_own(family: Family, *, attention: bool, quantize: bool, compiled: bool) -> None:
    """What only zoo's decoder can do."""
    options = {"--attention": attention, "--quantize": quantize, "--compile": compiled}
    for option in (name for name, is_given in options.items() if is_given):
        raise InputError(
            f"{option} can not be used: models of the family {family.name!r} are modules of its own.",
            fix="Leave it out.",
        )


def _open(model: str | Path, options: FetchOptions, registry: Registry, report: Callable[[str], None]) -> Checkpoint:
    found = resolve_model(str(model), registry, checkpoints=checkpoints_directory(), options=options, report=report)
    return open_checkpoint(trained_directory(found.path, "model", report), registry)


def _choose_quantizer(
    name: str | None, checkpoint: Checkpoint, device: torch.device, registry: Registry
) -> Quantizer | None:
    """The named one, or the one that the files were written for."""
    if name is not None:
        return choose_quantizer(name, device=device.type, registry=registry)
    if checkpoint.quantizer is None:
        return None
    fix = f"Take --device cpu, or dequantize it: zoo convert {checkpoint.path} NEW --to hf."
    return choose_quantizer(checkpoint.quantizer, device=device.type, registry=registry, fix=fix)


def build(
    model: str | ModelSpec,
    *,
    attention: str = "auto",
    seed: int | None = None,
    registry: Registry | None = None,
    **overrides: Any,
) -> Any:
    """A randomly initialised model (float32, CPU): zoo's decoder, or the module that the entry's family builds.

    Args:
        model: a registry name, or a spec.
        overrides: fields of the spec to change; what the registry entry derives (head size, ffn width) follows.

    Raises:
        InputError: the name or a field is unknown, or a value is out of range.
    """
    registry = registry or default_registry()
    family, spec = _family_and_spec(model, overrides, registry)
    if family is not None and family.build is not None:
        return _build_own(family.build, spec, seed)
    request = AttentionRequest.of(spec, device="cpu", dtype=torch.float32, training=True)
    built = GPT(spec, choose_attention(attention, request, registry).backend)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    init_weights(built, generator)
    return built


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    like: str,
    tokenizer: Tokenizer | None = None,
    registry: Registry | None = None,
    **overrides: Any,
) -> Exported:
    """Write a model that `build` made as a model directory, which every command takes. Merged adapters are part of it.

    Args:
        like: the registry name that it was built from; ``overrides`` as for `build`.

    Raises:
        InputError: the model is another, an adapter is active and not merged, or the directory is not empty.
    """
    family, spec = _family_and_spec(like, overrides, registry or default_registry())
    assert family is not None
    path = Path(directory)
    return export_model(from_model(model, fresh_checkpoint(family, spec, path, tokenizer)), path)


def _family_and_spec(
    model: str | ModelSpec, overrides: Mapping[str, Any], registry: Registry
) -> tuple[Family | None, ModelSpec]:
    if isinstance(model, ModelSpec):
        return None, ModelSpec.from_dict({**model.to_dict(), **overrides})
    entry = registry.model(model)
    family: Family = registry.load("family", entry.family)
    return family, ModelSpec.from_dict({**entry.spec_values, **overrides})


def _build_own(make: Callable[[ModelSpec], nn.Module], spec: ModelSpec, seed: int | None) -> nn.Module:
    """It initialises itself, from torch's global generator."""
    if seed is None:
        return make(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(spec)


def choose_device(name: str) -> torch.device:
    """The device of that name; for ``auto`` cuda, then mps, then cpu.

    Raises:
        InputError: torch knows no such device.
        UnavailableError: this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {name!r}.", fix="Take auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU was found"
        raise UnavailableError(f"device {name!r} can not be used: {why}.", fix="Take --device cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"device {name!r} can not be used: there are {torch.cuda.device_count()} GPUs.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UnavailableError("device 'mps' can not be used: it needs an Apple GPU.", fix="Take --device cpu or auto.")
    return device
