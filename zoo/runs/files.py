"""What a step's ``model/`` holds: a directory that every command takes as it is, and from which training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.convert.load import open_checkpoint
from zoo.registry import Registry
from zoo.runs.model import Trained
from zoo.text.prompts import PromptStyle

EXACT = "trained.safetensors"
"""The adapter to the bit, by zoo's names: some layouts hold a converted form (PiSSA at twice the rank)."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory, with the prompt style that it was trained with."""

    trained: Trained
    style: PromptStyle | None

    def export(self, directory: Path) -> None:
        """Write the adapter as it is now, for others."""
        directory.mkdir(parents=True, exist_ok=True)
        self.trained.handle.save(directory)
        if self.style is not None:
            self.style.save(directory)

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the adapter as it is now, and to the bit."""
        self.export(directory)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / EXACT)

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        """The tensors of `write`."""
        tensors: dict[str, Tensor] = load_file(directory / EXACT)
        return tensors


@dataclass(frozen=True)
class ModelDirectoryFiles:
    """A model directory."""

    trained: Trained
    registry: Registry

    def export(self, directory: Path) -> None:
        """Write the model as it is now, in place of what was written before."""
        shutil.rmtree(directory, ignore_errors=True)
        self.trained.lm.save(directory)

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the model as it is now."""
        self.trained.lm.save(directory)

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        """Its parameters, by zoo's names."""
        checkpoint = open_checkpoint(directory, self.registry)
        dtype = next(iter(self.trained.handle.trainable().values())).dtype
        return {name: tensor.clone() for name, tensor in checkpoint.parameters(dtype)}
