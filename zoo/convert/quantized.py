"""Model directories whose linears are stored as integers: written for one quantizer, loaded as they are.

Beside a Hugging Face directory's other files, ``quantized.safetensors`` holds our parameters by our names; a quantized
weight ``X`` is there as the plain tensors of its layer, ``X.integers`` and ``X.scale`` say (`QuantizedLinear.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.base import Checkpoint, ParameterReader, WriteOptions, Writing, cast
from zoo.convert.hf import QUANTIZED_WEIGHTS as WEIGHTS
from zoo.convert.hf import describe
from zoo.convert.hf_writer import hf_config, plain_dtype, tokenizer_to_save, write_companions, write_json
from zoo.convert.safetensors import SafetensorsReader, TensorSlot, write_safetensors
from zoo.errors import FileFormatError, InputError
from zoo.families.base import KeyMap, Rule
from zoo.families.transforms import TRANSFORMS
from zoo.plan.parameters import parameter_shapes
from zoo.precision.quantization import QuantizedLinear, Quantizer, StoredWeight, quantized_weights
from zoo.registry import Registry
from zoo.spec import ModelSpec
from zoo.text.json_files import read_json_object

_METHOD = "zoo"
"""``quant_method`` in config.json, so that other tools refuse the directory by name."""


class OwnNames(KeyMap):
    """Our parameters by our own names."""

    def __init__(self) -> None:
        super().__init__("")

    def rules(self, spec: ModelSpec) -> list[Rule]:
        """One rule for each parameter."""
        shapes = parameter_shapes(spec).items()
        return [Rule(name, (name,), (shape,), TRANSFORMS["same"], spec) for name, shape in shapes]


class QuantizedTensors:
    """Shows the integers of a file as the float weights that they stand for (a `TensorReader`).

    Raises:
        FileFormatError: a tensor of a quantized weight is missing, or of another shape or dtype than its layer has.
    """

    def __init__(self, path: Path, spec: ModelSpec, kinds: Mapping[str, type[QuantizedLinear]]) -> None:
        self._path, self._kinds = path, kinds
        self._reader = SafetensorsReader.from_files([path])
        self._shapes = parameter_shapes(spec)
        self._stored = frozenset(self._reader.names())
        self._parts = {name: self._checked_parts(name) for name in kinds}

    def names(self) -> list[str]:
        """Our names; those of the tensors that make up a weight are not among them."""
        parts = {part for parts in self._parts.values() for part in parts.values()}
        return [*self._kinds, *(name for name in self._reader.names() if name not in parts)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self._shapes[name] if name in self._kinds else self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """float32 for a quantized weight."""
        return torch.float32 if name in self._kinds else self._reader.dtype(name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter, in ``dtype`` if given."""
        weight = self.integers(name)
        if weight is None:
            return self._reader.get(name, dtype)
        return weight.dequantized().to(dtype or torch.float32)

    def integers(self, name: str) -> StoredWeight | None:
        """A quantized weight as it is stored."""
        if name not in self._kinds:
            return None
        return StoredWeight(self._kinds[name], {part: self._reader.get(p) for part, p in self._parts[name].items()})

    def _checked_parts(self, name: str) -> dict[str, str]:
        parts = {}
        for part, (shape, dtype) in self._kinds[name].layout(self._shapes[name], torch.float32).items():
            parts[part] = stored = f"{name}.{part}"
            if stored not in self._stored:
                raise FileFormatError(f"{self._path} lacks the tensor {stored!r}.")
            found, kind = self._reader.shape(stored), self._reader.dtype(stored)
            if found != shape or (kind != dtype and not (kind.is_floating_point and dtype.is_floating_point)):
                wanted = f"{list(shape)} of {dtype}"
                raise FileFormatError(f"{self._path}: tensor {stored!r} is {list(found)} of {kind}, not {wanted}.")
        return parts


class QuantizedDirectory:
    """The converter of such directories."""

    def reads(self, path: Path) -> bool:
        """A directory with ``quantized.safetensors`` and ``config.json``."""
        return (path / WEIGHTS).is_file() and (path / "config.json").is_file()

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open the directory. Nothing but headers is read.

        Raises:
            FileFormatError: a tensor is missing or damaged, or config.json does not say for which quantizer it is.
            InputError: no registered family reads its model type.
            UnknownNameError: its quantizer is not registered.
        """
        config = read_json_object(path / "config.json")
        name = _quantizer_name(config.pop("quantization_config", None), path)
        quantizer: Quantizer = registry.load("quantizer", name)()
        about = describe(path, config, registry)
        tensors = QuantizedTensors(path / WEIGHTS, about["spec"], quantized_weights(about["spec"], quantizer))
        return Checkpoint(
            **about, keys=OwnNames(), tensors=tensors, quantized=True, quantizer=name, integers=tensors.integers
        )

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Writing:
        """Prepare a directory of `WriteOptions.quantizer`'s layers; what it leaves alone is bfloat16 by default.

        Raises:
            InputError: no quantizer is given, or config.json can not hold the model.
        """
        quantizer = options.quantizer
        if quantizer is None:
            raise InputError("this format holds quantized weights.", fix="Say which: --quantize int8, or int4.")
        dtype = plain_dtype(replace(options, quantizer=None), "quantized") or torch.bfloat16
        kinds = quantized_weights(checkpoint.spec, quantizer)
        slots = _slots(checkpoint, kinds, dtype, options.progress)
        config = hf_config(checkpoint, dtype)
        config["quantization_config"] = {"quant_method": _METHOD, "quantizer": quantizer.name}
        tokenizer = tokenizer_to_save(checkpoint)

        def to(directory: Path) -> None:
            directory.mkdir()
            digest = write_safetensors(directory / WEIGHTS, slots)
            write_json(directory / "config.json", config)
            write_companions(directory, checkpoint, tokenizer, {WEIGHTS: digest})

        reader = ParameterReader(checkpoint)

        def rounded(name: str, values: Tensor) -> Tensor:
            if (kind := kinds.get(name)) is None:
                return cast(name, values, dtype)
            return reader.quantized(name, kind, dtype).dequantized()

        return Writing(len(slots), sum(slot.n_bytes for slot in slots), to, rounded)


def _quantizer_name(said: Any, path: Path) -> str:
    name = said.get("quantizer") if isinstance(said, Mapping) and said.get("quant_method") == _METHOD else None
    if not isinstance(name, str):
        raise FileFormatError(
            f"{path / 'config.json'} does not say for which quantizer {WEIGHTS} was written; quantization_config is "
            f"{said!r}."
        )
    return name


def _slots(
    checkpoint: Checkpoint,
    kinds: Mapping[str, type[QuantizedLinear]],
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> list[TensorSlot]:
    """The tensors to write, one weight held at a time."""
    reader = ParameterReader(checkpoint)

    @lru_cache(maxsize=1)  # its parts are written one after the other
    def weight(name: str) -> StoredWeight:
        return reader.quantized(name, kinds[name], dtype)

    def read(name: str, part: str | None) -> Tensor:
        tensor = cast(name, reader.get(name), dtype) if part is None else weight(name).tensors[part]
        progress(tensor.nbytes)
        return tensor

    slots = []
    for name, shape in parameter_shapes(checkpoint.spec).items():
        if name not in kinds:
            slots.append(TensorSlot(name, shape, dtype, partial(read, name, None)))
            continue
        for part, (part_shape, part_dtype) in kinds[name].layout(shape, dtype).items():
            slots.append(TensorSlot(f"{name}.{part}", part_shape, part_dtype, partial(read, name, part)))
    return slots
