"""What every file format is opened as, and how it becomes our parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.errors import FileFormatError
from zoo.families.base import Family, KeyMap, Rule
from zoo.registry import Registry
from zoo.spec import ModelSpec
from zoo.text.tokenizer import Tokenizer


class TensorReader(Protocol):
    """Random access to the stored tensors of a checkpoint. Nothing is read before `get`."""

    def names(self) -> list[str]:
        """Stored names, in file order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which `get` returns it by default: the stored one, float32 for a quantized tensor."""

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in ``dtype`` if given; memory-mapped where the file allows it and no conversion is asked for.

        Raises:
            FileFormatError: the file is truncated or damaged there.
        """


@dataclass
class Checkpoint:
    """An opened file or directory of weights."""

    path: Path
    family: Family
    spec: ModelSpec
    keys: KeyMap
    """How its tensor names map to our parameters."""
    tensors: TensorReader
    config: dict[str, Any]
    """Its Hugging Face config, as read or as derived; ``spec`` is what the family reads from it."""
    load_tokenizer: Callable[[], Tokenizer]
    """Raises `FileFormatError` when there is none, saying where one was looked for."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Content of generation_config.json: ``eos_token_id`` and sampling defaults."""
    quantized: bool = False
    """Whether the stored tensors were dequantized to be read."""
    companions: tuple[Path, ...] = ()
    """Files to carry along as they are: tokenizer, chat template, generation config, licence."""

    def located(self) -> dict[str, Rule]:
        """The rule of every stored tensor that holds weights.

        Raises:
            FileFormatError: a tensor is missing, unknown, or of another shape than the spec says.
        """
        located = self.keys.locate(self.spec, self.tensors.names(), str(self.path))
        for stored, rule in located.items():
            found = self.tensors.shape(stored)
            if found != rule.stored_shape:
                expected = list(rule.stored_shape)
                raise FileFormatError(
                    f"{self.path}: tensor {stored!r} has shape {list(found)}; the config needs {expected}."
                )
        return located

    def parameters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Our parameters by name, in ``dtype`` if given, one stored tensor at a time. Raises as `located`."""
        for stored, rule in self.located().items():
            yield from zip(rule.ours, rule.split(self.tensors.get(stored, dtype)), strict=True)


class Converter(Protocol):
    """One file format."""

    def reads(self, path: Path) -> bool:
        """Whether ``path`` looks like this format; only names and headers are looked at."""

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open ``path``.

        Raises:
            FileFormatError: it is damaged or incomplete.
            InputError: its model type is one that no registered family reads.
        """
