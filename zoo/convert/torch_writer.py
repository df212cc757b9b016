"""Writes files that ``torch.load`` reads, with weights only, holding one tensor at a time in memory."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from zoo.convert.safetensors import TensorSlot

_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
}


class _Tensor:
    """Pickles as torch pickles a tensor: how to rebuild it from a storage that lies elsewhere in the archive."""

    def __init__(self, key: str, slot: TensorSlot) -> None:
        self.storage = _Storage(key, slot)
        self.shape = slot.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Storage:
    def __init__(self, key: str, slot: TensorSlot) -> None:
        self.id = ("storage", _STORAGES[slot.dtype], key, "cpu", prod(slot.shape))


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, _Storage) else None


def write_torch_file(path: Path, slots: Sequence[TensorSlot], shared: Mapping[str, str]) -> None:
    """Write a state dict in the zip format of ``torch.save`` (torch 1.6 and later).

    Args:
        path: of the file.
        slots: the tensors, in order.
        shared: further names of tensors, by the name that each is written under.
    """
    entries = {slot.name: _Tensor(str(key), slot) for key, slot in enumerate(slots)}
    entries |= {name: entries[first] for name, first in shared.items()}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(entries)
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled.getvalue(), pickled.tell())
    writer.write_record("byteorder", b"little", len(b"little"))
    for key, slot in enumerate(slots):
        values = slot.read()
        assert tuple(values.shape) == slot.shape and values.dtype == slot.dtype, slot.name
        raw = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        writer.write_record(f"data/{key}", raw, len(raw))
    writer.write_end_of_file()
