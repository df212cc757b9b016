"""A LoRA as it is, beside the one that PEFT's layout has for it, so that zoo goes on with what it saved.

PEFT has one A, one B and one scaling for a module. For parts of its outputs, and for projections that are apart in zoo,
it gets another LoRA that computes the same, and would train otherwise. Then a third file, ``zoo_adapter.safetensors``,
holds the tensors that are others in zoo and, in its metadata, the options. PEFT does not look at it, and zoo neither
once the other two files have been changed, or on a model whose sites have other names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.adapters.attach import AttachedAdapter
from zoo.convert.adapter_files import WEIGHTS, StoredAdapter
from zoo.convert.adapter_names import OwnNames
from zoo.errors import FileFormatError
from zoo.sources.provenance import sha256_of

OWN_FORM = "zoo_adapter.safetensors"
_TOLD = "zoo"
"""The one key of the metadata: several would stand in a random order."""
_CHECKED = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Of ``adapter_config.json``: what else an update depends on than tensors."""


def write_own_form(
    handle: AttachedAdapter, directory: Path, config: Mapping[str, Any], readable: StoredAdapter
) -> list[str]:
    """Write the file, if what reading the other two gives is not the adapter; returns what a reader should know."""
    path, state, same = directory / OWN_FORM, handle.state_dict(), readable.state
    own = {key: tensor for key, tensor in state.items() if key not in same or not torch.equal(tensor, same[key])}
    is_same = not own and len(state) == len(same)
    if is_same or handle.adapter.options.init == "pissa":  # which decomposes every weight before its state is loaded
        path.unlink(missing_ok=True)
        return []
    sites = [addition.site.name for addition in handle.plan.additions]
    whole = [key.removesuffix(".weight") for key in handle.plan.unfrozen or {} if key.endswith(".weight")]
    explicit = {"targets": [f"={site}" for site in sites], "modules_to_save": [f"={site}" for site in whole]}
    told = {
        "options": asdict(handle.adapter.options) | explicit,
        "others": [key for key in state if key not in own],
        "config": {key: config[key] for key in _CHECKED},
        "sha256": sha256_of(directory / WEIGHTS),
    }
    tensors = {key: tensor.contiguous() for key, tensor in own.items()}
    save_file(tensors, path, metadata={_TOLD: json.dumps(told, sort_keys=True)})
    return [f"{OWN_FORM} has it as it is, for zoo"]


def read_own_form(directory: Path, config: Mapping[str, Any], stored: StoredAdapter, names: OwnNames) -> StoredAdapter:
    """The adapter as it was saved, if there is that file and it holds; else what the other two have, ``stored``.

    Raises:
        FileFormatError: it is damaged.
    """
    path = directory / OWN_FORM
    if not path.exists():
        return stored
    try:
        told, own = _read(path)
        is_current = told["sha256"] == sha256_of(directory / WEIGHTS) and all(
            config.get(key) == value for key, value in told["config"].items()
        )
        wanted = {key.rpartition(".")[0] for key in (*own, *told["others"])}
        if not is_current or wanted - {site for module in names.modules() for site in names.sites(module)}:
            return stored
        state = {key: stored.state[key] for key in told["others"]} | own
        return replace(stored, options={k: _tuples(v) for k, v in told["options"].items()}, state=state)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{path} is damaged: {error}.", fix="Delete it, and the adapter is read in the form that PEFT has for it."
        ) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[_TOLD])
        return told, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def _tuples(value: Any) -> Any:
    """As options have it: JSON has lists alone."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(one) for key, one in value.items()} if isinstance(value, dict) else value
