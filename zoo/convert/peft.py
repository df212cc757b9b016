"""Adapter directories as PEFT writes them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Shape letters: D_out, D_in of a site, R rank, P prompt, D model width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.base import Adapted
from zoo.adapters.plans import LoRAOptions, by_pattern
from zoo.adapters.weights import is_transposed, weight_of
from zoo.convert.adapter_files import WEIGHTS, StoredAdapter, read_config, read_tensors, write_files
from zoo.convert.adapter_names import OwnNames
from zoo.convert.own_form import read_own_form, write_own_form
from zoo.convert.peft_fused import Fused, Update, lower_rank
from zoo.convert.peft_methods import common_config, read_ia3, read_prompts
from zoo.errors import FileFormatError, InputError

_LORA = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_IGNORED_OPTIONS = {"use_qalora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication"}
"""Options that change what is computed, and that zoo does not know: refused where they are set."""
_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of ``init_lora_weights`` with which PEFT changes the weights of the base: the adapter holds on those alone."""


def read_peft(directory: Path, names: OwnNames) -> StoredAdapter:
    """Read an adapter for a model whose modules are named so outside.

    Raises:
        FileFormatError: a file is missing or damaged, its kind is none of zoo's, or the model lacks a module of it.
    """
    config = read_config(directory)
    kind = config.get("peft_type")
    read = _READERS.get(str(kind))
    if read is None:
        raise FileFormatError(
            f"{directory} holds an adapter of the peft_type {kind!r}, which zoo does not read.",
            fix=f"It reads: {', '.join(_READERS)}.",
        )
    stored = read(config, read_tensors(directory), names, directory)
    return read_own_form(directory, config, stored, names)


def _refuse_options(config: Mapping[str, Any], directory: Path) -> None:
    for option in _IGNORED_OPTIONS:
        if config.get(option):
            raise FileFormatError(f"{directory} was made with {option}, which zoo's LoRA does not have.")
    init = config.get("init_lora_weights")
    if str(init).lower().startswith(_CHANGING_INITS):
        raise FileFormatError(
            f"{directory} was made with init_lora_weights={init!r}, for weights that PEFT changed at the start.",
            fix="Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )


def _read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: OwnNames, where: Path) -> StoredAdapter:
    """A and B of modules outside, by our sites: where one holds several, they have one A, which trains as one."""
    _refuse_options(config, where)
    modules: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _LORA.fullmatch(key):
            modules.setdefault(match[1], {})[match[2]] = tensor
        elif not key.endswith(".base_layer.weight"):  # an embedding's own weight, which PEFT adds: the base has it
            state |= _whole_parameter(key, tensor, names, where)
    if not modules:
        raise FileFormatError(f"{where} / {WEIGHTS} holds no LoRA weights.")
    whole = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    share: list[tuple[str, ...]] = []
    for module, leaves in modules.items():
        sites = names.sites(module)
        A, B, alpha = _update_of(module, leaves, config, where)
        ranks |= dict.fromkeys(sites, len(A))
        alphas |= dict.fromkeys(sites, alpha)
        share += [tuple(f"={site}" for site in sites)] if len(sites) > 1 else []
        state[f"{sites[0]}.lora_A"] = A
        parts = {"lora_B": [B] if "lora_embedding_B" in leaves else names.split(module, B)}
        if (norms := leaves.get("lora_magnitude_vector")) is not None:
            parts["lora_magnitude"] = names.split(module, norms)
        state |= {f"{site}.{leaf}": part for leaf, of in parts.items() for site, part in zip(sites, of, strict=True)}
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
        "share": tuple(share),
    }
    return StoredAdapter("lora", options, state)


def _update_of(
    module: str, leaves: Mapping[str, Tensor], config: Mapping[str, Any], where: Path
) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of a module outside."""
    pair = _EMBEDDING if leaves.keys() & set(_EMBEDDING) else _LINEAR
    if missing := [leaf for leaf in pair if leaf not in leaves]:
        raise FileFormatError(f"{where} / {WEIGHTS} holds LoRA weights of {module} without {missing[0]}.")
    alpha = by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return lower_rank(leaves[pair[0]], leaves[pair[1]], alpha, is_rslora=config.get("use_rslora", False))


def _whole_parameter(key: str, tensor: Tensor, names: OwnNames, where: Path) -> dict[str, Tensor]:
    """A weight or bias that is trained itself."""
    name = key.replace(".base_layer.", ".")
    if name.rpartition(".")[2] not in ("weight", "bias"):
        raise FileFormatError(f"{where}: the tensor {key} is of no kind that zoo knows.")
    return dict(zip(names.parameters(name), names.split_parameter(name, tensor), strict=True))


def write_peft(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write a LoRA as PEFT does; returns what a reader should know, one line each.

    Where one module outside holds several sites (a fused qkv), their updates become one: of the same rank if they
    share A, else block-diagonal, of the sum of their ranks; so do those of the parts of a site. PEFT has one scaling
    for a module: where they differ, B takes it in. What PiSSA takes off is written beside what it trains, with which
    it is a plain LoRA of twice the rank for the weights as they are. What is another LoRA by then is kept for zoo as it
    is, too: see `zoo.convert.own_form`.

    Raises:
        InputError: PEFT's layout can not hold it. Nothing is written.
    """
    options: LoRAOptions = handle.adapter.options
    tensors, ranks, scales, notes = _lora_tensors(handle, options, names)
    whole, more = _whole_tensors(handle, names, ranks)
    tensors |= whole
    r = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {m: scale * (ranks[m] ** 0.5 if options.rslora else ranks[m]) for m, scale in scales.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = common_config("LORA", handle, names, base) | {
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": options.dropout,
        "target_modules": sorted(ranks),
        "bias": options.bias,
        "fan_in_fan_out": all(_is_transposed(handle, names, module) for module in ranks),
        "init_lora_weights": True,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "modules_to_save": sorted(_saved_whole(handle, names)) or None,
        "rank_pattern": {re.escape(m): rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(m): _plain(value) for m, value in alphas.items() if value != alpha},
    }
    readable = _read_lora(config, tensors, names, directory)
    write_files(directory, config, tensors)
    return notes + more + write_own_form(handle, directory, config, readable)


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
    for addition in handle.plan.additions:
        state |= {f"{addition.site.name}.{key}": state[f"{site}.{key}"] for key, site in addition.shared.items()}
    for module in dict.fromkeys(names.module(site) for site in sites):
        inside = names.sites(module)
        given = [site for site in inside if site in sites]
        if sites[given[0]].kind == "embedding":
            tensors[f"{module}.lora_embedding_A"] = state[f"{given[0]}.lora_A"]
            tensors[f"{module}.lora_embedding_B"] = state[f"{given[0]}.lora_B"]
            ranks[module], scales[module] = options.rank(sites[given[0]]), options.scaling(sites[given[0]])
            continue
        fused = Fused(names, module, [Update.of(sites[s], state, options) if s in sites else None for s in inside])
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = fused.matrices()
        ranks[module], scales[module] = tensors[f"{module}.lora_A.weight"].shape[0], fused.scaling
        if options.dora:
            norms = [state[f"{s}.lora_magnitude"] if s in sites else _norms(handle, s) for s in inside]
            tensors[f"{module}.lora_magnitude_vector"] = names.merge(module, norms)
        notes += fused.notes()
    return tensors, ranks, scales, notes


def _whole_tensors(
    handle: AttachedAdapter, names: OwnNames, with_lora: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights and biases that are trained themselves, by outside key, and what to tell: PEFT has them only whole."""
    tensors: dict[str, Tensor] = {}
    notes = []
    trained = {key: tensor for key, tensor in handle.state_dict().items() if key in (handle.plan.unfrozen or {})}
    for key in trained:
        site, _, leaf = key.rpartition(".")
        module = names.module(site)
        if module in with_lora and leaf == "weight":
            raise InputError(f"PEFT trains {module} in full or with LoRA, and this adapter does both")
        name, place = f"{module}.{leaf}", f"{module}.base_layer.{leaf}" if module in with_lora else f"{module}.{leaf}"
        if place in tensors:
            continue
        inside = names.parameters(name)
        if frozen := [one for one in inside if one not in trained]:
            notes.append(f"{name}: written whole, though {' and '.join(frozen)} in it are as they were")
        values = [trained[one] if one in trained else handle.base_parameter(one).detach() for one in inside]
        tensors[place] = names.merge_parameter(name, values)
    return tensors, notes


def _norms(handle: AttachedAdapter, site: str) -> Tensor:
    """The norms of a site's outputs (D_out,), with which DoRA changes nothing."""
    return weight_of(_base(handle, site)).norm(dim=1)


def _is_transposed(handle: AttachedAdapter, names: OwnNames, module: str) -> bool:
    """Whether a module outside, or one that is used as it is, holds its weight inputs first."""
    return names.is_transposed(module) or is_transposed(_base(handle, names.sites(module)[0]))


def _base(handle: AttachedAdapter, site: str) -> nn.Module:
    module = handle.root.get_submodule(site)
    return module.base if isinstance(module, Adapted) else module


def _saved_whole(handle: AttachedAdapter, names: OwnNames) -> set[str]:
    """Modules outside whose weights are trained in full."""
    weights = (key for key in handle.plan.unfrozen or {} if key.endswith(".weight"))
    return {names.module(key.removesuffix(".weight")) for key in weights}


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


_Read = Callable[[Mapping[str, Any], Mapping[str, Tensor], OwnNames, Path], StoredAdapter]
_READERS: dict[str, _Read] = {"LORA": _read_lora, "IA3": read_ia3, "ADAPTION_PROMPT": read_prompts}
