"""Safetensors files: memory-mapped random access in, one tensor at a time out."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import FileFormatError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the file format spells them."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class SafetensorsReader:
    """The tensors of one file or several shards.

    Args:
        files: the file that each stored tensor name is in.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open_path: Path | None = None
        self._open: Any = None
        self._headers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in dict.fromkeys(files.values()):
            self._read_header(path)

    @classmethod
    def from_files(cls, paths: Iterable[Path]) -> SafetensorsReader:
        """All tensors of the given files.

        Raises:
            FileFormatError: a file is truncated, damaged or missing.
        """
        return cls({name: path for path in paths for name in _opened(path).keys()})  # noqa: SIM118 - no dict

    def names(self) -> list[str]:
        """Stored names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._headers[name][1]

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy-on-write view of the mapped file, or a converted copy. The file itself is never written."""
        path = self._files[name]
        if path != self._open_path:  # one shard at a time: an unused mapping is released
            self._open_path, self._open = path, _opened(path)
        try:
            tensor: Tensor = self._open.get_tensor(name)
        except SafetensorError as error:
            raise FileFormatError(f"{path} is damaged at tensor {name!r}: {error}.") from None
        return tensor if dtype is None else tensor.to(dtype)

    def _read_header(self, path: Path) -> None:
        opened = _opened(path)
        inside = set(opened.keys())
        for name in (n for n, p in self._files.items() if p == path):
            if name not in inside:
                raise FileFormatError(f"{path} lacks the tensor {name!r} that the index promises.")
            header = opened.get_slice(name)
            dtype = header.get_dtype()
            if dtype not in _DTYPES:
                raise FileFormatError(f"{path}: tensor {name!r} is stored as {dtype}, which zoo does not read.")
            self._headers[name] = (tuple(header.get_shape()), _DTYPES[dtype])


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise FileFormatError(f"{path} is missing.", fix="Download the model again.") from None
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is truncated or damaged: {error}.", fix="Download it again.") from None


class TensorSlot:
    """A tensor to be written: its name, shape and dtype now, its values when its turn comes."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
        self.name, self.shape, self.dtype, self.read = name, shape, dtype, read

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, slots: list[TensorSlot]) -> str:
    """Write one file, holding one tensor at a time in memory; returns its sha256.

    The layout is the one of the safetensors specification: an 8-byte little-endian header length, a JSON header
    padded with spaces to a multiple of 8, the tensors back to back.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for slot in slots:
        end = offset + slot.n_bytes
        header[slot.name] = {"dtype": DTYPE_NAMES[slot.dtype], "shape": slot.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(chunk)
            file.write(chunk)
        for slot in slots:
            values = slot.read()
            assert tuple(values.shape) == slot.shape and values.dtype == slot.dtype, slot.name
            raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(raw)
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
