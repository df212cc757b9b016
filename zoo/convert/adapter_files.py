"""The two files of an adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.errors import FileFormatError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT's wrapper puts before every name."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as a directory holds it, in zoo's terms.

    Attributes:
        adapter: registered name.
        options: of the adapter.
        state: what `AttachedAdapter.load_state_dict` takes.
        notes: what was assumed because the files do not say it, one line each.
    """

    adapter: str
    options: dict[str, Any]
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_config(directory: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        FileFormatError: it is missing or damaged.
    """
    path = directory / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileFormatError(
            f"{directory} is no adapter directory: it has no {CONFIG}.",
            fix="Give the directory that PEFT or zoo wrote.",
        ) from None
    except ValueError as error:
        raise FileFormatError(f"{path} is no JSON: {error}.") from None
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The weights, without the prefix of PEFT's wrapper.

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        raise FileFormatError(f"{directory} has no {WEIGHTS}.", fix="Save it with PEFT 0.5 or later.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FileFormatError(f"{path} is damaged: {error}.") from None
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def write_files(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, prefix: str = PREFIX
) -> None:
    """Write both; ``prefix`` goes before every name."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
