"""Adapter directories as PEFT writes them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Shape letters: D_out, D_in of a site, R rank, P prompt, D model width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.base import Adapted
from zoo.adapters.plans import LoRAOptions, by_pattern
from zoo.adapters.weights import is_transposed, weight_of
from zoo.convert.adapter_files import WEIGHTS, StoredAdapter, read_config, read_tensors, write_files
from zoo.convert.adapter_names import OwnNames
from zoo.convert.peft_methods import read_ia3, read_prompts
from zoo.errors import FileFormatError, InputError
from zoo.plan.sites import Site

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
    return read(config, read_tensors(directory), names, directory)


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
    _refuse_options(config, where)
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
    _lower_ranks(state, ranks, alphas, is_rslora=config.get("use_rslora", False))
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


def _lower_ranks(state: dict[str, Tensor], ranks: dict[str, int], alphas: dict[str, float], *, is_rslora: bool) -> None:
    """Has the same update at the rank of a site's weight where a file has more: a product of larger ones is no more.

    Block-diagonal updates of fused projections can have that, and those with what PiSSA takes off.
    """
    for site, rank in ranks.items():
        A, B = state.get(f"{site}.lora_A"), state.get(f"{site}.lora_B")
        if A is None or B is None or A.dim() > 2 or B.dim() > 2 or rank <= min(len(B), A.shape[1]):
            continue
        product = (B.double() @ A.double()).to(A.dtype)
        ranks[site] = lower = min(product.shape)
        alphas[site] *= (lower / rank) ** (0.5 if is_rslora else 1.0)
        one = torch.eye(lower, dtype=A.dtype)
        state[f"{site}.lora_A"], state[f"{site}.lora_B"] = (product, one) if len(B) == lower else (one, product)


def write_peft(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write a LoRA as PEFT does; returns what a reader should know, one line each.

    Where one module outside holds several sites (a fused qkv), their updates become one: of the same rank if they
    share A, else block-diagonal, of the sum of their ranks; so do those of the parts of a site. PEFT has one scaling
    for a module: where they differ, B takes it in. What PiSSA takes off is written beside what it trains, with which
    it is a plain LoRA of twice the rank for the weights as they are.

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
        "fan_in_fan_out": all(_is_transposed(handle, names, module) for module in ranks),
        "init_lora_weights": True,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "modules_to_save": sorted(_saved_whole(handle, names)) or None,
        "rank_pattern": {re.escape(m): rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(m): _plain(value) for m, value in alphas.items() if value != alpha},
    }
    write_files(directory, config, tensors)
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
        fused = _Fused(names, module, [_update(sites[s], state, options) if s in sites else None for s in inside])
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = fused.matrices()
        ranks[module], scales[module] = tensors[f"{module}.lora_A.weight"].shape[0], fused.scaling
        if options.dora:
            norms = [state[f"{s}.lora_magnitude"] if s in sites else _norms(handle, s) for s in inside]
            tensors[f"{module}.lora_magnitude_vector"] = names.merge(module, norms)
        notes += fused.notes()
    for key in handle.plan.unfrozen or {}:
        site, _, leaf = key.rpartition(".")
        module = names.module(site)
        inside = names.sites(module)
        place = f"{module}.base_layer" if module in ranks else module
        tensors[f"{place}.{leaf}"] = names.merge(module, [state[f"{one}.{leaf}"] for one in inside])
    return tensors, ranks, scales, notes


@dataclass(frozen=True)
class _Update:
    """What is added at a site, scaling * B A, with A (R, D_in) and B (D_out, R).

    Attributes:
        ranks: of its parts, which it holds block-diagonally; empty if its outputs are not divided.
        folded: whether B has taken in factors between the scalings of parts.
        starts: whether it holds what PiSSA takes off.
    """

    A: Tensor
    B: Tensor
    scaling: float
    ranks: tuple[int, ...] = ()
    folded: bool = False
    starts: bool = False


def _update(site: Site, state: Mapping[str, Tensor], options: LoRAOptions) -> _Update:
    A, B = state[f"{site.name}.lora_A"], state[f"{site.name}.lora_B"]
    if ranks := options.part_ranks(site):
        scalings = options.part_scalings(site)
        scaling = max(scalings, key=abs)
        blocks = [block * _ratio(own, scaling) for block, own in zip(B.split(ranks, dim=1), scalings, strict=True)]
        return _Update(A, torch.block_diag(*blocks), scaling, ranks, folded=len({*scalings} - {0.0}) > 1)
    if (A0 := state.get(f"{site.name}.lora_A0")) is not None:
        stacked = torch.cat([A, A0]), torch.cat([B, -state[f"{site.name}.lora_B0"]], dim=1)
        return _Update(*stacked, options.scaling(site), starts=True)
    return _Update(A, B, options.scaling(site))


def _ratio(scaling: float, common: float) -> float:
    return 1.0 if scaling == common else scaling / common  # both are 0 with an alpha of 0


class _Fused:
    """The updates of the sites that one module outside holds; ``None`` where a site has none."""

    def __init__(self, names: OwnNames, module: str, updates: Sequence[_Update | None]) -> None:
        self._names, self._module, self._updates = names, module, updates
        self._given = [update for update in updates if update is not None]
        self.scaling = max((update.scaling for update in self._given), key=abs)
        self._shared = all(torch.equal(update.A, self._given[0].A) for update in self._given)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (R, D_in) and B (D_out, R) of the module."""
        As = [update.A for update in self._given]
        if len(self._updates) == 1:
            return As[0], self._given[0].B
        n_columns = len(As[0]) if self._shared else sum(map(len, As))
        rows, start = [], 0
        for i, update in enumerate(self._updates):
            if update is None:
                rows.append(As[0].new_zeros(self._names.outputs(self._module)[i], n_columns))
                continue
            B = update.B * _ratio(update.scaling, self.scaling)
            wide = B.new_zeros(B.shape[0], n_columns)
            wide[:, start : start + B.shape[1]] = B
            start += 0 if self._shared else B.shape[1]
            rows.append(wide)
        return As[0] if self._shared else torch.cat(As), self._names.merge(self._module, rows)

    def notes(self) -> list[str]:
        """What a reader should know."""
        rank = len(self._given[0].A) if self._shared else sum(len(update.A) for update in self._given)
        said = []
        if len(self._updates) > 1 and not self._shared:
            said.append(f"{len(self._given)} updates written as one of rank {rank}")
        said += [f"parts of ranks {u.ranks} written as one update of rank {len(u.A)}" for u in self._given if u.ranks]
        if any(update.folded or update.scaling != self.scaling for update in self._given):
            said.append(f"their different scaling is in B, beside one of {self.scaling:g}")
        if any(update.starts for update in self._given):
            said.append("with what PiSSA takes off the weight, a plain LoRA of twice the rank")
        return [f"{self._module}: {'; '.join(said)}"] if said else []


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
