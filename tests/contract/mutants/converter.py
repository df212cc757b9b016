"""Hugging Face directories, read or written with one thing wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.base import Checkpoint
from zoo.convert.hf import HuggingFace
from zoo.families.base import KeyMap
from zoo.registry import Registry
from zoo.spec import ModelSpec
from zoo.text.new_tokenizers import byte_tokenizer


class _Reader:
    """The tensors of another, with some of them changed."""

    def __init__(self, real: Any, change: Callable[[Any, str, Tensor], Tensor]) -> None:
        self._real, self._change = real, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        changed = self._change(self._real, name, self._real.get(name))
        return changed if dtype is None else changed.to(dtype)


class Changed(HuggingFace):
    """Reads tensors as `change` gives them."""

    def change(self, reader: Any, name: str, values: Tensor) -> Tensor:
        return values

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        checkpoint = super().open(path, registry)
        return replace(checkpoint, tensors=_Reader(checkpoint.tensors, self.change))


class KeysSwapped(Changed):
    def change(self, reader: Any, name: str, values: Tensor) -> Tensor:
        other = name.replace("q_proj", "k_proj") if "q_proj" in name else name.replace("k_proj", "q_proj")
        found: Tensor = reader.get(other)
        return found


class Transposed(Changed):
    def change(self, reader: Any, name: str, values: Tensor) -> Tensor:
        return values.T.contiguous() if "o_proj" in name else values


class Rounded(Changed):
    def change(self, reader: Any, name: str, values: Tensor) -> Tensor:
        return values.bfloat16().to(values.dtype)


class HeaderLies(Changed):
    def change(self, reader: Any, name: str, values: Tensor) -> Tensor:
        return values.double()


class _Ignoring(KeyMap):
    def __init__(self, real: KeyMap) -> None:
        self.__dict__.update(real.__dict__)

    def locate(self, spec: ModelSpec, stored_names: Any, where: str) -> Any:
        rules = {rule.stored: rule for rule in self.rules(spec)}
        return {name: rules[name] for name in stored_names if name in rules}


class IgnoresNames(HuggingFace):
    """What is missing stays as it was, and what is too much is dropped."""

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        checkpoint = super().open(path, registry)
        return replace(checkpoint, keys=_Ignoring(checkpoint.keys))


class ReadsAll(HuggingFace):
    def reads(self, path: Path) -> bool:
        return True


class ReadsNone(HuggingFace):
    def reads(self, path: Path) -> bool:
        return False


class Mends(HuggingFace):
    """Fills a file that was cut off with zeros."""

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        file = path / "model.safetensors"
        content = file.read_bytes()
        (n_header,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + n_header])
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        file.write_bytes(content.ljust(8 + n_header + end, b"\0"))
        return super().open(path, registry)


class OtherTokenizer(HuggingFace):
    def open(self, path: Path, registry: Registry) -> Checkpoint:
        return replace(super().open(path, registry), load_tokenizer=byte_tokenizer)


class SpecDrifts(HuggingFace):
    """Leaves out that something is scaled."""

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        checkpoint = super().open(path, registry)
        rope = checkpoint.spec.rope
        assert rope is not None
        return replace(checkpoint, spec=replace(checkpoint.spec, rope=replace(rope, base=rope.base / 2)))
