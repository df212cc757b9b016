"""Checkpoints of microsoft's loralib 0.1.2: ``<module>.lora_A`` and ``<module>.lora_B``, and biases if asked for.

The file holds neither the scaling nor which parts of a fused linear (`MergedLinear`) were active: the caller says so.

Shape letters: D_out, D_in of a module, R rank, L equal parts of a fused linear of which K are active, V vocabulary,
D model width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.adapter_coverage import require_whole_layers
from zoo.convert.adapter_files import StoredAdapter
from zoo.convert.adapter_names import OwnNames
from zoo.convert.torch_file import checked_tensors, load_torch_file, some, without_prefix
from zoo.errors import FileFormatError, InputError
from zoo.plan.sites import Site

_SAME = OwnNames()
_PARALLEL = "module."
"""What ``DistributedDataParallel`` puts before every name, and loralib's own example saves."""


@dataclass(frozen=True)
class _Update:
    """What is added at one of our sites: A (n R, D_in) and B (D_out, n R), of n of the module's parts.

    Where the site is the whole module, and fused, ``ranks`` are those of its L parts, and B is (D_out / L, n R).
    """

    A: Tensor
    B: Tensor
    n_parts: int = 1
    ranks: tuple[int, ...] = ()


def read_loralib(
    path: Path,
    sites: Sequence[Site],
    names: OwnNames = _SAME,
    *,
    alpha: float | None = None,
    enabled: Sequence[bool] | None = None,
    partial: bool | None = False,
) -> StoredAdapter:
    """Read an adapter for a model with these sites, whose modules are named so outside.

    A fused linear that the model has as one, too, gets a LoRA of parts, and trains on as it does there. A site that
    rows of several parts end up in gets one LoRA of rank n R, with A stacked and B block-diagonal, and the scaling of
    its parts. It computes the same; trained on, the zeros beside the blocks train too.

    Args:
        alpha: ``lora_alpha``, which the file does not hold; by default loralib's, 1, which is noted.
        enabled: ``enable_lora`` of the file's `MergedLinear`, needed if some of their parts are inactive.
        partial: whether it may lack modules of layers that it adapts: see `require_whole_layers`.

    Raises:
        FileFormatError: the file is missing or damaged, may have been saved while merged, lacks a module, holds a
            convolution or anything else that is no LoRA or bias, the model lacks a module of it, or a rank is above
            that of a weight.
        InputError: ``enabled`` is needed, or does not fit.
    """
    by_name = {site.name: site for site in sites}
    tensors = _read_tensors(path, by_name)
    _check_keys(tensors, by_name, path)
    updates: dict[str, _Update] = {}
    biases: dict[str, Tensor] = {}
    idle: list[Site] = []
    for module in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        inside = _sites(module, names, by_name, path)
        if f"{module}.lora_A" in tensors:
            A, B = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
            found = _Module(module, inside, names, path).updates(A, B, enabled)
            idle += [site for site in inside if site.name not in found]
            updates |= found
        if f"{module}.bias" in tensors:
            biases |= _split_bias(module, tensors[f"{module}.bias"], inside, names, path)
    if not updates:
        raise FileFormatError(f"{path} holds no LoRA weights.", fix="Save lora.lora_state_dict(model) with loralib.")
    if not partial:
        require_whole_layers(updates.keys(), sites, names, path)
    for name, update in updates.items():
        _check_rank(by_name[name], update, path)
    bias = _bias_option(biases, updates, idle, by_name, path)
    state = {f"{name}.lora_A": update.A for name, update in updates.items()}
    state |= {f"{name}.lora_B": update.B for name, update in updates.items()}
    options = _options(updates, 1.0 if alpha is None else alpha, bias, by_name)
    note = f"{path} does not say its alpha: 1, loralib's default, is assumed. Else give alpha=, as in {path},alpha=16."
    return StoredAdapter("lora", options, state | biases, (note,) if alpha is None else ())


def _read_tensors(path: Path, by_name: Mapping[str, Site]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileFormatError(f"{path} is no file.", fix="Give the file that torch.save wrote.")
    content = load_torch_file(path)
    if isinstance(content, dict) and "model_state_dict" in content:
        content = content["model_state_dict"]
    tensors = checked_tensors(content, str(path))
    if all(key.startswith(_PARALLEL) for key in tensors) and not any(name.startswith(_PARALLEL) for name in by_name):
        return without_prefix(tensors, _PARALLEL)
    return tensors


def _check_keys(tensors: Mapping[str, Tensor], by_name: Mapping[str, Site], path: Path) -> None:
    leaves: dict[str, set[str]] = {}
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        leaves.setdefault(module, set()).add(leaf)
    adapted = [module for module, own in leaves.items() if own & {"lora_A", "lora_B"}]
    for module in adapted:
        site = by_name.get(module)
        if (site and site.kind == "conv") or f"{module}.conv" in {*leaves, *by_name}:
            raise FileFormatError(
                f"{path} holds the LoRA of a convolution, {module}. loralib forms its update across the kernel's rows, "
                "which zoo's convolutions can not hold.",
                fix="Train it anew with zoo.adapt, or merge it into the weights with loralib.",
            )
    if merged := [f"{module}.weight" for module in adapted if "weight" in leaves[module]]:
        raise FileFormatError(
            f"{path} holds weights beside their LoRA ({some(merged)}). loralib merges on model.eval() and does not "
            "save that it did, so the update may be in them already.",
            fix="Call model.train() and save lora.lora_state_dict(model).",
        )
    if unknown := [key for key in tensors if key.rpartition(".")[2] not in ("lora_A", "lora_B", "bias")]:
        raise FileFormatError(
            f"{path} holds what is neither LoRA nor a bias: {some(unknown)}.",
            fix="Save lora.lora_state_dict(model) with loralib.",
        )
    if halves := [module for module in adapted if not leaves[module] >= {"lora_A", "lora_B"}]:
        raise FileFormatError(f"{path} holds only one of lora_A and lora_B of {some(halves)}.")


def _sites(module: str, names: OwnNames, by_name: Mapping[str, Site], path: Path) -> list[Site]:
    try:
        return [by_name[name] for name in names.sites(module)]
    except (FileFormatError, KeyError):
        raise FileFormatError(f"{path} holds {module}, and the model has no such linear or embedding.") from None


@dataclass(frozen=True)
class _Module:
    """A module outside, and our sites in it."""

    name: str
    sites: Sequence[Site]
    names: OwnNames
    path: Path

    def updates(self, A: Tensor, B: Tensor, enabled: Sequence[bool] | None) -> dict[str, _Update]:
        """By site, of A (K R, D_in) and B (K D_out / L, R), or of an embedding's (R, V) and (D, R).

        Sites without a row in an active part are left out.
        """
        if self.sites[0].kind == "embedding":
            self._check((A.dim(), B.dim()) == (2, 2) and A.shape[:1] == B.shape[1:], A, B)
            self._check((A.shape[1], B.shape[0]) == self.sites[0].shape, A, B)
            return {self.sites[0].name: _Update(A, B)}
        active = self._active(A, B, enabled)
        rank = B.shape[1]
        if len(active) > 1 and self._is_one_site():
            blocks = torch.cat(B.chunk(sum(active)), dim=1)
            return {self.sites[0].name: _Update(A, blocks, ranks=tuple(rank if part else 0 for part in active))}
        rows = self.names.split(self.name, _block_diagonal(B, active))
        marks = self.names.split(self.name, _block_diagonal(B.new_ones(len(B), 1), active))
        found = {}
        for site, site_rows, site_marks in zip(self.sites, rows, marks, strict=True):
            used = site_marks.bool().any(dim=0)
            if used.any():
                columns = used.repeat_interleave(rank)
                found[site.name] = _Update(A[columns], site_rows[:, columns].contiguous(), int(used.sum()))
        return found

    def _is_one_site(self) -> bool:
        """Whether the model has this module as it is in the file, with the outputs in the same order."""
        rows = torch.arange(self.sites[0].shape[0])
        return len(self.sites) == 1 and torch.equal(self.names.split(self.name, rows)[0], rows)

    def _active(self, A: Tensor, B: Tensor, enabled: Sequence[bool] | None) -> list[bool]:
        """For each of the L parts whether it is active; L and K follow from the shapes, and K = L = 1 is a `Linear`."""
        d_out = sum(site.shape[0] for site in self.sites)
        self._check(self.sites[0].kind == "linear" and (A.dim(), B.dim()) == (2, 2), A, B)
        self._check(bool(B.numel()) and A.shape[1] == self.sites[0].shape[1] and A.shape[0] % B.shape[1] == 0, A, B)
        n_active = A.shape[0] // B.shape[1]
        self._check(n_active > 0 and len(B) % n_active == 0 and len(B) <= d_out, A, B)
        width = len(B) // n_active
        self._check(d_out % width == 0, A, B)
        n_parts = d_out // width
        if n_active == n_parts:
            return [True] * n_parts
        which = f"{self.path} holds the LoRA of {n_active} of the {n_parts} equal parts of {self.name}"
        example = [True] * n_active + [False] * (n_parts - n_active)
        if enabled is None:
            raise InputError(
                f"{which}, and not of which ones.",
                fix=f"Give enabled=, as enable_lora= was given to MergedLinear, such as {example}.",
            )
        if len(enabled) != n_parts or sum(map(bool, enabled)) != n_active:
            raise InputError(
                f"{which}, which enabled={list(enabled)} does not fit.",
                fix=f"Give what enable_lora= was given to MergedLinear, such as {example}.",
            )
        return [bool(part) for part in enabled]

    def _check(self, fits: bool, A: Tensor, B: Tensor) -> None:
        if not fits:
            own = " + ".join(str(site.shape) for site in self.sites)
            raise FileFormatError(
                f"{self.path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit {self.name}, whose "
                f"weight is {own} here.",
                fix="Take the model that it was trained on.",
            )


def _block_diagonal(B: Tensor, active: Sequence[bool]) -> Tensor:
    """B (K D_out / L, R) as (D_out, K R): each active part in its own rows and columns."""
    blocks = iter(B.chunk(sum(active)))
    width, rank = len(B) // sum(active), B.shape[1]
    wide = B.new_zeros(len(active), width, sum(active), rank)
    columns = iter(range(sum(active)))
    for part in (i for i, is_active in enumerate(active) if is_active):
        wide[part, :, next(columns)] = next(blocks)
    return wide.view(len(active) * width, -1)


def _check_rank(site: Site, update: _Update, path: Path) -> None:
    """Whether the site can have the rank, of a part if it is divided."""
    rank = max(update.ranks, default=update.B.shape[1])
    d_out, d_in = site.shape[0] // (len(update.ranks) or 1), prod(site.shape[1:])
    if rank > min(d_out, d_in):
        of = "a part of " if update.ranks else ""
        together = f", where {update.n_parts} of its parts come together" if update.n_parts > 1 else ""
        raise FileFormatError(
            f"{path} holds LoRA of rank {rank} for {of}{site.name}{together}. With {d_in} inputs and {d_out} outputs "
            f"the rank that zoo's LoRA can have there is {min(d_out, d_in)}.",
            fix="Merge it into the weights with loralib.",
        )


def _split_bias(module: str, bias: Tensor, inside: Sequence[Site], names: OwnNames, path: Path) -> dict[str, Tensor]:
    width = sum(site.shape[0] for site in inside)
    if tuple(bias.shape) != (width,) or not all(site.has_bias for site in inside):
        own = f"one of {width}" if all(site.has_bias for site in inside) else "none"
        raise FileFormatError(f"{path}: {module}.bias is {tuple(bias.shape)}, and the model has {own}.")
    parts = names.split(module, bias)
    return {f"{site.name}.bias": part.contiguous() for site, part in zip(inside, parts, strict=True)}


def _bias_option(
    biases: Mapping[str, Tensor],
    updates: dict[str, _Update],
    idle: Sequence[Site],
    by_name: Mapping[str, Site],
    path: Path,
) -> str:
    """Which biases are there. Adds an update of zero, which stays zero in training, where only a bias trains."""
    if not biases:
        return "none"
    every = {f"{site.name}.bias" for site in by_name.values() if site.has_bias}
    if biases.keys() == every:
        return "all"
    for site in idle:
        if f"{site.name}.bias" in biases:
            some_A = next(iter(updates.values())).A
            d_out, d_in = site.shape[0], prod(site.shape[1:])
            updates[site.name] = _Update(some_A.new_zeros(1, d_in), some_A.new_zeros(d_out, 1))
    adapted = {f"{name}.bias" for name in updates if by_name[name].has_bias}
    if biases.keys() == adapted:
        return "lora_only"
    wanted, whose = (adapted, "the modules with LoRA") if biases.keys() < adapted else (every, "the model")
    raise FileFormatError(
        f"{path} holds some of the biases of {whose}, and lacks {some(wanted - biases.keys())}.",
        fix='Save lora.lora_state_dict(model, bias="lora_only"), or bias="all".',
    )


def _options(updates: Mapping[str, _Update], alpha: float, bias: str, by_name: Mapping[str, Site]) -> dict[str, Any]:
    ranks = {name: max(update.ranks, default=update.B.shape[1]) for name, update in updates.items()}
    alphas = {name: alpha * update.n_parts for name, update in updates.items()}
    r, usual = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "alpha": usual,
        "targets": tuple(f"={name}" for name in updates),
        "bias": bias,
        "rank_pattern": {_pattern(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {_pattern(name): value for name, value in alphas.items() if value != usual},
        "parts": {_pattern(name): update.ranks for name, update in updates.items() if update.ranks},
    }


def _pattern(name: str) -> str:
    """A key for this site alone, and not for those whose names end so."""
    return f"^{re.escape(name)}"
