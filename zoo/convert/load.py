"""From a path to an opened checkpoint, and from a checkpoint to a model with its weights in place."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zoo.convert.base import Checkpoint, Converter
from zoo.errors import FileFormatError, InputError, UnavailableError
from zoo.models.attention import Attend
from zoo.models.gpt import GPT
from zoo.registry import Registry


def open_checkpoint(path: Path, registry: Registry, *, format_name: str | None = None) -> Checkpoint:
    """Open ``path`` with the converter that reads it, or with the named one.

    Raises:
        InputError: the path does not exist.
        FileFormatError: no converter reads it, several do, or the file is damaged.
        UnknownNameError: no converter is named ``format_name``.
    """
    if not path.exists():
        raise InputError(f"there is no file or directory {str(path)!r}.")
    if format_name is not None:
        named: Converter = registry.load("converter", format_name)()
        return named.open(path, registry)
    readers, unusable = _readers(path, registry)
    if not readers:
        formats = ", ".join(f"{name} ({component.help})" for name, component in registry.components("converter"))
        not_tried = "".join(f" {why}" for why in unusable)
        raise FileFormatError(f"{path} holds no model that zoo can read.", fix=f"Formats: {formats}.{not_tried}")
    if len(readers) > 1:
        raise FileFormatError(f"{path} can be read as {' and '.join(readers)}.", fix="Choose one with --from.")
    return next(iter(readers.values())).open(path, registry)


def _readers(path: Path, registry: Registry) -> tuple[dict[str, Converter], list[str]]:
    """The converters that read ``path``, and why others could not be asked: a broken one must not stop the rest."""
    readers: dict[str, Converter] = {}
    unusable = []
    for name, _ in registry.components("converter"):
        try:
            converter: Converter = registry.load("converter", name)()
        except UnavailableError as error:
            unusable.append(str(error))
            continue
        if converter.reads(path):
            readers[name] = converter
    return readers, unusable


def load_any(
    checkpoint: Checkpoint, attend: Attend, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """As `load_model`, or the module of its own that the family builds, which needs no attention backend."""
    if checkpoint.family.build is not None:
        return load_own(checkpoint, dtype=dtype, device=device)
    return load_model(checkpoint, attend, dtype=dtype, device=device)


def load_model(
    checkpoint: Checkpoint, attend: Attend, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> GPT:
    """The decoder with the checkpoint's weights, in evaluation mode.

    Weights that are stored in ``dtype`` on the CPU stay memory-mapped: nothing is copied until it is written to.

    Raises:
        FileFormatError: a tensor is missing, unknown, damaged or of another shape than the config says.
    """
    with torch.device("meta"):
        model = GPT(checkpoint.spec, attend)
    for name, tensor in checkpoint.parameters(dtype):
        module_name, _, parameter_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(tensor.to(device)))
    model.tie()
    is_mapped = not checkpoint.quantized and checkpoint.tensors.dtype(next(iter(checkpoint.located()))) == dtype
    if not is_mapped or torch.device(device).type != "cpu":
        model.join()
    return model.eval()


def load_own(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The module that the checkpoint's family builds, with its weights, in evaluation mode. Raises as `load_model`."""
    assert checkpoint.family.build is not None
    module = checkpoint.family.build(checkpoint.spec)  # not on the meta device: buffers may hold what no file has
    own = dict(module.named_parameters())
    for name, tensor in checkpoint.parameters(dtype):
        own[name].data = tensor
    return module.to(device=device, dtype=dtype).eval()
