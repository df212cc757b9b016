"""Writes GGUF files that llama.cpp loads, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from torch import Tensor

from zoo.convert.base import Checkpoint, WriteOptions, Writing, cast, parameter_slots, refuse_quantizer
from zoo.convert.gguf_config import metadata_from_generation, metadata_from_spec, norm_offsets
from zoo.convert.gguf_vocabulary import metadata_from_tokenizer
from zoo.convert.safetensors import TensorSlot
from zoo.errors import InputError
from zoo.families.base import Rule
from zoo.families.gguf_metadata import ROPE_TENSORS
from zoo.sources.provenance import read_provenance

_KINDS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items() if isinstance(dtype, torch.dtype)}
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight")
"""Matrices and vectors that llama.cpp's kernels expect so; everything one-dimensional is, too."""


@dataclass(frozen=True)
class _Slot:
    """A tensor to be written, and as what."""

    values: TensorSlot
    kind: GGMLQuantizationType
    offset: float = 0.0
    """Added to the values, in float32."""

    @property
    def n_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.values.shape) // block * int(block_bytes)


def write_gguf(checkpoint: Checkpoint, options: WriteOptions) -> Writing:
    """Prepare a GGUF file with the model, its tokenizer and its chat template. Raises as `Writer.write`."""
    refuse_quantizer(options, "gguf")
    metadata = metadata_from_spec(checkpoint.spec, checkpoint.family)
    factors = {name: metadata.pop(name) for name in ROPE_TENSORS if name in metadata}
    assert checkpoint.family.gguf is not None
    rules = checkpoint.family.gguf.keys.rules(checkpoint.spec)
    offsets = norm_offsets(checkpoint.spec, checkpoint.family)
    slots = [
        _Slot(slot, _kind(rule, slot.dtype if options.dtype is None else options.dtype), offsets.get(slot.name, 0.0))
        for rule, slot in zip(rules, parameter_slots(checkpoint, rules, None, lambda n_bytes: None), strict=True)
    ]
    metadata |= _about(checkpoint, slots, options)
    tokenizer = checkpoint.load_tokenizer()
    metadata |= metadata_from_tokenizer(tokenizer, checkpoint.spec.vocab_size)
    added = tokenizer.backend.get_added_tokens_decoder().keys()
    metadata |= metadata_from_generation(checkpoint.generation, checkpoint.config, metadata, added)
    architecture = checkpoint.family.gguf.architecture
    by_name = {name: slot for rule, slot in zip(rules, slots, strict=True) for name in rule.ours}

    def rounded(name: str, values: Tensor) -> Tensor:
        slot = by_name[name]
        if slot.kind in _DTYPES:
            return _shifted(cast(name, _shifted(values, slot.offset), _DTYPES[slot.kind]), -slot.offset)
        raw = gguf.quants.quantize(values.float().contiguous().numpy(), slot.kind)
        return torch.from_numpy(gguf.quants.dequantize(raw, slot.kind))

    return Writing(
        n_tensors=len(slots),
        n_bytes=sum(slot.n_bytes for slot in slots),
        to=lambda path: _write(path, architecture, metadata, factors, slots, options.progress),
        rounded=rounded,
    )


def _kind(rule: Rule, chosen: torch.dtype | str) -> GGMLQuantizationType:
    """The type of a tensor, as llama.cpp's converter chooses it."""
    if len(rule.stored_shape) == 1 or rule.stored.endswith(_ALWAYS_F32):
        return GGMLQuantizationType.F32
    if chosen not in _KINDS:
        raise InputError(
            f"zoo writes no {str(chosen).removeprefix('torch.')} in a GGUF file.", fix="Take f32, f16, bf16 or q8_0."
        )
    kind = _KINDS[chosen]
    block = GGML_QUANT_SIZES[kind][0]
    if rule.stored_shape[-1] % block:
        raise InputError(
            f"{kind.name} needs rows of a multiple of {block} values; {rule.stored!r} has {rule.stored_shape[-1]}.",
            fix="Write --dtype f16 or bf16.",
        )
    return kind


def _about(checkpoint: Checkpoint, slots: Sequence[_Slot], options: WriteOptions) -> dict[str, Any]:
    """The ``general.*`` metadata."""
    known = read_provenance(checkpoint.directory)
    matrices = [slot.kind for slot in slots if len(slot.values.shape) > 1]
    found = {
        "general.type": "model",
        "general.name": known.model or checkpoint.path.stem,
        "general.file_type": int(_FILE_TYPES[matrices[-1]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.license": options.license,
        "general.source.url": known.source,
    }
    return {key: value for key, value in found.items() if value is not None}


def _write(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    factors: dict[str, list[float]],
    slots: Sequence[_Slot],
    progress: Callable[[int], None],
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, values in factors.items():
            writer.add_tensor_info(f"{name}.weight", (len(values),), np.dtype(np.float32), 4 * len(values))
        for slot in slots:
            shape, dtype = slot.values.shape, np.dtype(np.float32)
            writer.add_tensor_info(slot.values.name, shape, dtype, slot.n_bytes, raw_dtype=slot.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(np.array(values, np.float32))
        for slot in slots:
            writer.write_tensor_data(_raw(slot))
            progress(slot.n_bytes)
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _raw(slot: _Slot) -> np.ndarray:
    """The bytes of a tensor."""
    values = _shifted(slot.values.read(), slot.offset)
    if slot.kind in _DTYPES:
        plain = cast(slot.values.name, values, _DTYPES[slot.kind]).contiguous()
        return plain.view(torch.uint8).numpy()
    quantized: np.ndarray = gguf.quants.quantize(values.float().numpy(), slot.kind)
    return quantized


def _shifted(values: Tensor, offset: float) -> Tensor:
    return values.float() + offset if offset else values
