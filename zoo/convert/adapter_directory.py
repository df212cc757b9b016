"""Adapter directories: PEFT's layout for LoRA; for methods that PEFT lacks the same two files, with zoo's own names.

The ``peft_type`` of those is ``ZOO``, with the adapter's registered name and its options beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.plans import LoRAOptions
from zoo.convert.adapter_names import OwnNames
from zoo.convert.peft import CONFIG, WEIGHTS, StoredAdapter, read_config, read_peft, read_tensors, write_peft
from zoo.errors import FileFormatError

OWN_TYPE = "ZOO"


def read_adapter(directory: Path, names: OwnNames) -> StoredAdapter:
    """Read an adapter for a model whose modules are named so outside.

    Raises:
        FileFormatError: a file is missing or damaged, or the adapter is of a kind that zoo does not know.
    """
    config = read_config(directory)
    if config.get("peft_type") != OWN_TYPE:
        return read_peft(directory, names)
    try:
        adapter, options = config["zoo_adapter"], dict(config["zoo_options"])
    except (KeyError, TypeError, ValueError):
        raise FileFormatError(f"{directory / CONFIG} names no adapter of zoo's.") from None
    return StoredAdapter(adapter, options, read_tensors(directory))


def write_adapter(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write an adapter; returns what a reader should know, one line each.

    Raises:
        InputError: it is a LoRA that PEFT's layout can not hold.
    """
    options: Any = handle.adapter.options
    if isinstance(options, LoRAOptions):
        return write_peft(handle, directory, names, base=base)
    config = {
        "peft_type": OWN_TYPE,
        "zoo_adapter": handle.adapter.name,
        "zoo_options": asdict(options),
        "base_model_name_or_path": base,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in handle.state_dict().items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return []
