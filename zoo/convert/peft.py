"""Adapter directories as PEFT writes them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Shape letters: D_out, D_in of a site, R rank, P prompt, D model width.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.plans import LoRAOptions, by_pattern
from zoo.convert.adapter_names import OwnNames
from zoo.errors import FileFormatError, InputError
from zoo.plan.sites import Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
_OURS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
_IGNORED_OPTIONS = {"use_qalora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication"}
"""Options that change what is computed, and that zoo does not know: refused where they are set."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as a directory holds it, in zoo's terms.

    Attributes:
        adapter: registered name.
        options: of the adapter.
        state: what `AttachedAdapter.load_state_dict` takes.
    """

    adapter: str
    options: dict[str, Any]
    state: dict[str, Tensor]


def read_peft(directory: Path, names: OwnNames) -> StoredAdapter:
    """Read an adapter for a model whose modules are named so outside.

    Raises:
        FileFormatError: a file is missing or damaged, its kind is none of zoo's, or the model lacks a module of it.
    """
    config = read_config(directory)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FileFormatError(
            f"{directory} holds an adapter of the peft_type {kind!r}, which zoo does not read.", fix="It reads: LORA."
        )
    for option in _IGNORED_OPTIONS:
        if config.get(option):
            raise FileFormatError(f"{directory} was made with {option}, which zoo's LoRA does not have.")
    return _read_lora(config, read_tensors(directory), names, directory)


def read_config(directory: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        FileFormatError: it is missing or damaged.
    """
    path = directory / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
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
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: OwnNames, where: Path) -> StoredAdapter:
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    whole: list[str] = []
    patterns = config.get("alpha_pattern") or {}
    for key, tensor in tensors.items():
        if match := _LORA.fullmatch(key):
            module, leaf = match[1], match[2]
            sites = names.sites(module)
            if leaf in ("lora_A.weight", "lora_embedding_A"):
                parts = [tensor] * len(sites)
                ranks |= dict.fromkeys(sites, tensor.shape[0])
                alphas |= dict.fromkeys(sites, by_pattern(patterns, module, config.get("lora_alpha", 8)))
            elif leaf == "lora_embedding_B":
                parts = [tensor]
            else:
                parts = names.split(module, tensor)
            state |= {f"{site}.{_OURS[leaf]}": part for site, part in zip(sites, parts, strict=True)}
            continue
        module, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
        sites = names.sites(module)
        if leaf == "weight" and ".base_layer." in key:
            continue  # an embedding's own weight, which PEFT adds: the base has it
        if leaf not in ("weight", "bias"):
            raise FileFormatError(f"{where}: the tensor {key} is of no kind that zoo knows.")
        whole += sites if leaf == "weight" else []
        parts = names.split(module, tensor) if leaf == "bias" or len(sites) > 1 else [tensor]
        state |= {f"{site}.{leaf}": part for site, part in zip(sites, parts, strict=True)}
    if not ranks:
        raise FileFormatError(f"{where} / {WEIGHTS} holds no LoRA weights.")
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    options = {
        "r": r,
        "alpha": alpha,
        "targets": tuple(f"={site}" for site in ranks),
        "dropout": config.get("lora_dropout", 0.0),
        "bias": config.get("bias", "none"),
        "rslora": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
        "rank_pattern": {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(site)}": value for site, value in alphas.items() if value != alpha},
        "modules_to_save": tuple(f"={site}" for site in whole),
    }
    return StoredAdapter("lora", options, state)


def write_peft(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write a LoRA as PEFT does; returns what a reader should know, one line each.

    Where one module outside holds several sites (a fused qkv), their updates become one: of the same rank if they
    share A, else block-diagonal, of the sum of their ranks.

    Raises:
        InputError: it is no LoRA.
    """
    options = handle.adapter.options
    if not isinstance(options, LoRAOptions):
        raise InputError(f"adapter {handle.name!r} is no LoRA: PEFT's layout has no place for it.")
    tensors, ranks, scales, notes = _lora_tensors(handle, options, names)
    r = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {m: scale * (ranks[m] ** 0.5 if options.rslora else ranks[m]) for m, scale in scales.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": options.dropout,
        "target_modules": sorted(ranks),
        "bias": options.bias,
        "fan_in_fan_out": all(names.is_transposed(module) for module in ranks),
        "init_lora_weights": True,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "modules_to_save": sorted(_saved_whole(handle, names)) or None,
        "rank_pattern": {re.escape(m): rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(m): _plain(value) for m, value in alphas.items() if value != alpha},
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file({_PREFIX + k: t.contiguous() for k, t in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return notes


def _lora_tensors(
    handle: AttachedAdapter, options: LoRAOptions, names: OwnNames
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float], list[str]]:
    """Tensors by outside key; rank and scaling by module; what to tell."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    notes: list[str] = []
    sites = {addition.site.name: addition.site for addition in handle.plan.additions}
    state = handle.state_dict()
    for module in dict.fromkeys(names.module(site) for site in sites):
        inside = names.sites(module)
        given = [site for site in inside if site in sites]
        if sites[given[0]].kind == "embedding":
            tensors[f"{module}.lora_embedding_A"] = state[f"{given[0]}.lora_A"]
            tensors[f"{module}.lora_embedding_B"] = state[f"{given[0]}.lora_B"]
            ranks[module], scales[module] = options.rank(sites[given[0]]), options.scaling(sites[given[0]])
            continue
        fused = _Fused(names, module, [sites.get(site) for site in inside], state, options)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = fused.matrices()
        ranks[module], scales[module] = tensors[f"{module}.lora_A.weight"].shape[0], fused.scaling
        if options.dora:
            tensors[f"{module}.lora_magnitude_vector"] = fused.magnitude()
        if len(inside) > 1 and not fused.shared:
            notes.append(f"{module}: {len(given)} updates written as one of rank {ranks[module]}")
    for key in handle.plan.unfrozen or {}:
        site, _, leaf = key.rpartition(".")
        module = names.module(site)
        inside = names.sites(module)
        place = f"{module}.base_layer" if module in ranks else module
        tensors[f"{place}.{leaf}"] = names.merge(module, [state[f"{one}.{leaf}"] for one in inside])
    return tensors, ranks, scales, notes


class _Fused:
    """The updates of the sites that one module outside holds; ``None`` where a site has none."""

    def __init__(
        self,
        names: OwnNames,
        module: str,
        parts: Sequence[Site | None],
        state: Mapping[str, Tensor],
        options: LoRAOptions,
    ) -> None:
        self._names, self._module, self._parts, self._state = names, module, parts, state
        given = [part for part in parts if part is not None]
        self.scaling = options.scaling(given[0])
        first = state[f"{given[0].name}.lora_A"]
        self.shared = all(torch.equal(state[f"{part.name}.lora_A"], first) for part in given)
        if any(options.scaling(part) != self.scaling for part in given):
            raise InputError(f"{module} would hold updates of different scaling, which PEFT can not write.")

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (R, D_in) and B (D_out, R) of the module."""
        given = [part for part in self._parts if part is not None]
        As = [self._state[f"{part.name}.lora_A"] for part in given]
        widths = [len(As[0])] if self.shared else [len(A) for A in As]
        rows, start = [], 0
        for i, part in enumerate(self._parts):
            if part is None:
                rows.append(As[0].new_zeros(self._names.outputs(self._module)[i], sum(widths)))
                continue
            B = self._state[f"{part.name}.lora_B"]
            wide = B.new_zeros(B.shape[0], sum(widths))
            wide[:, start : start + B.shape[1]] = B
            start += 0 if self.shared else B.shape[1]
            rows.append(wide)
        return As[0] if self.shared else torch.cat(As), self._names.merge(self._module, rows)

    def magnitude(self) -> Tensor:
        """The norms of all outputs (D_out,)."""
        if None in self._parts:
            raise InputError(f"{self._module} would need the norms of sites that dora has not adapted.")
        return self._names.merge(
            self._module, [self._state[f"{part.name}.lora_magnitude"] for part in self._parts if part]
        )


def _saved_whole(handle: AttachedAdapter, names: OwnNames) -> set[str]:
    """Modules outside whose weights are trained in full."""
    weights = (key for key in handle.plan.unfrozen or {} if key.endswith(".weight"))
    return {names.module(key.removesuffix(".weight")) for key in weights}


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
