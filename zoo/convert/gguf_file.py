"""The container that llama.cpp stores models in: a header with metadata, then aligned tensors, quantized or not.

The header is parsed here rather than by ``gguf.GGUFReader``, which makes a numpy array of every token (1.5 s and
150 MB for a vocabulary of 49k) and does not end on a damaged count. Layout and limits: ggml's docs/gguf.md, gguf.cpp.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from zoo.errors import FileFormatError
from zoo.precision.int4 import Int4Linear
from zoo.precision.quantization import StoredWeight

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
_CHUNK = 1 << 15
"""Values dequantized at a time, a multiple of every block size. Larger arrays leave the cache and malloc's pool."""

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_INT4 = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_LENGTH = struct.Struct("<Q")
_TRUNCATED = "it is truncated, or a length in its header is wrong"


@dataclass(frozen=True)
class _Stored:
    """One tensor as the header describes it; ``start`` counts from the beginning of the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class GGUFTensors:
    """Random access to the tensors of a GGUF file (a `TensorReader`), and its metadata.

    F32, F16 and BF16 are views of a private (copy-on-write) mapping: whoever writes to one never alters the file.

    Raises:
        FileFormatError: the header or an offset is damaged, or a tensor is of a type that can not be dequantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        cursor = _Cursor(self._data, path)
        try:
            self.metadata, self._stored = _read_header(cursor)
        except struct.error:
            raise cursor.damaged(_TRUNCATED) from None
        except (LookupError, ValueError) as error:  # text that is no UTF-8, a type of value that nobody knows
            raise cursor.damaged(f"near byte {cursor.at}, {error}") from None
        self.offsets: Mapping[str, float] = {}
        """What `get` takes off the values of some tensors, in float32 and before they are rounded."""
        self.quantized = any(stored.kind not in _PLAIN for stored in self._stored.values())

    def names(self) -> list[str]:
        """Stored names, in file order."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape of a tensor, as torch has it; GGUF writes the reverse."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype, or float32 for a quantized tensor and for one with an offset."""
        if name in self.offsets:
            return torch.float32
        return _PLAIN.get(self._find(name).kind, torch.float32)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in ``dtype`` if given; memory-mapped when neither that nor its type asks for a conversion.

        Raises:
            FileFormatError: there is none of this name.
        """
        if name in self.offsets:
            return (self._stored_values(name, torch.float32) - self.offsets[name]).to(dtype or torch.float32)
        return self._stored_values(name, dtype)

    def _stored_values(self, name: str, dtype: torch.dtype | None) -> Tensor:
        stored = self._find(name)
        raw = np.frombuffer(self._data, np.uint8, stored.n_bytes, stored.start)
        if stored.kind in _PLAIN:
            plain = torch.from_numpy(raw).view(_PLAIN[stored.kind]).view(stored.shape)
            return plain if dtype is None else plain.to(dtype)
        block, block_bytes = GGML_QUANT_SIZES[stored.kind]
        flat = torch.empty(prod(stored.shape), dtype=dtype or torch.float32)
        for start in range(0, flat.numel(), _CHUNK):
            piece = raw[start // block * block_bytes : (start + _CHUNK) // block * block_bytes]
            flat[start : start + _CHUNK] = torch.from_numpy(dequantize(piece, stored.kind))
        return flat.view(stored.shape)

    def integers(self, name: str) -> StoredWeight | None:
        """The tensor as it is stored, if an int4 layer can hold its values exactly: a matrix in Q4_0 or Q4_1."""
        stored = self._find(name)
        if stored.kind not in _INT4 or len(stored.shape) != 2:
            return None
        block, block_bytes = GGML_QUANT_SIZES[stored.kind]
        raw = np.frombuffer(self._data, np.uint8, stored.n_bytes, stored.start)
        blocks = torch.from_numpy(raw).view(stored.shape[0], stored.shape[1] // block, block_bytes)
        nibbles = blocks[..., -block // 2 :]
        numbers = blocks[..., : -block // 2].contiguous().view(torch.float16).float()
        scale = numbers[..., 0]
        # value = scale * (integer - 8) in Q4_0, scale * integer + minimum in Q4_1 (ggml-quants.c)
        zero = torch.zeros_like(scale) if stored.kind == GGMLQuantizationType.Q4_0 else numbers[..., 1] + 8 * scale
        return StoredWeight(Int4Linear, {"nibbles": nibbles.flatten(1), "scale": scale, "zero": zero})

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise FileFormatError(f"{self.path} has no tensor {name!r}.")
        return self._stored[name]


class _Cursor:
    """Reads a header front to back. Past the end of the file, `struct` raises `struct.error`, before it allocates."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, len(_MAGIC)

    def damaged(self, reason: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is damaged: {reason}.", fix="Copy or download it again.")

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        found = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return found

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        data, at, found = self.data, self.at, []
        for _ in range(count):
            end = at + 8 + _LENGTH.unpack_from(data, at)[0]
            if end > len(data):
                raise self.damaged(_TRUNCATED)
            found.append(data[at + 8 : end].decode())
            at = end
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        """A metadata value. A float32 becomes the shortest decimal that rounds to it: 1e-05, not 9.99999974e-06."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element == GGUFValueType.STRING:
                return self.strings(count)
            return list(self.numbers(_SCALARS[GGUFValueType(element)], count))
        value = self.number(_SCALARS[GGUFValueType(kind)])
        return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value


def begins_as_gguf(path: Path) -> bool:
    """Whether ``path`` is a file whose first four bytes are GGUF's."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _map(path: Path) -> mmap.mmap:
    if not begins_as_gguf(path):
        raise FileFormatError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata, and tensors in file order."""
    version, n_tensors, n_values = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in _VERSIONS:
        found = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise FileFormatError(f"{cursor.path} is a GGUF file {found}; zoo reads little-endian ones of version 2 and 3.")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two from 8 on")
    return metadata, _read_tensor_table(cursor, n_tensors, alignment)


def _read_tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, _Stored]:
    """The tensors, with their places in the file checked: one after the other, each aligned, all within the file."""
    infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int, int]] = {}
    for _ in range(count):
        name, n_dims = cursor.string(), cursor.number("I")
        if name in infos or not 1 <= n_dims <= _MAX_DIMS:
            raise cursor.damaged(f"tensor {name!r} occurs twice or has {n_dims} dimensions")
        shape = cursor.numbers("Q", n_dims)[::-1]
        kind = _kind(cursor, name, cursor.number("I"))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise cursor.damaged(f"tensor {name!r} of type {kind.name} has the impossible shape {list(shape)}")
        infos[name] = shape, kind, cursor.number("Q"), prod(shape) // block * block_bytes
    data_start = _padded(cursor.at, alignment)
    stored, expected = {}, 0
    for name, (shape, kind, offset, n_bytes) in infos.items():
        start = data_start + offset
        if offset != expected or start + n_bytes > len(cursor.data):
            raise cursor.damaged(f"tensor {name!r} lies at {start} to {start + n_bytes} of {len(cursor.data)} bytes")
        stored[name] = _Stored(kind, shape, start, n_bytes)
        expected = _padded(offset + n_bytes, alignment)
    return stored


def _kind(cursor: _Cursor, name: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        spelled = f"number {number}"
    else:
        if _can_dequantize(kind):
            return kind
        spelled = kind.name
    raise FileFormatError(f"{cursor.path}: tensor {name!r} is of type {spelled}, which zoo can not read.")


@cache
def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
