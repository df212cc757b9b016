"""The sites of a module tree, by the types of its modules and where they stand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from zoo.adapters.base import Adapted, AttentionSite, Prompts
from zoo.adapters.weights import is_quantized, is_transposed, shape_of
from zoo.adapters.zoo_attention import ZooAttentionSite
from zoo.models.attention import Attention
from zoo.plan.sites import Kind, Site

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def sites_of(root: nn.Module) -> list[Site]:
    """The sites of any module tree, adapted or not, in the order of its modules.

    What stands in a numbered layer has the rest of its name as its role; the output projection has the role ``head``.
    """
    modules = list(_modules(root))
    uses = Counter(id(weight) for _, module in modules if (weight := getattr(module, "weight", None)) is not None)
    head = _head(root, modules)
    sites = []
    for name, module in modules:
        if (kind := _kind(module)) is None:
            continue
        layer, role = _place(name)
        if kind == "attention":
            site = attention_site(module)
            sites.append(Site(name, role, kind, (site.width, site.n_heads), layer))
            continue
        sites.append(
            Site(
                name,
                "head" if module is head else role,
                kind,
                shape_of(module),
                layer,
                has_bias=getattr(module, "bias", None) is not None,
                tied=uses[id(getattr(module, "weight", None))] > 1,
                transposed=is_transposed(module),
            )
        )
    return sites


def parameters_of(root: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a model once, under its name before anything was adapted, without those of adapters."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in _parameters(root):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def _parameters(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((f"{prefix}{name}", parameter) for name, parameter in root.named_parameters(recurse=False))
    for name, child in root.named_children():
        if not isinstance(child, Prompts):
            yield from _parameters(child.base if isinstance(child, Adapted) else child, f"{prefix}{name}.")


def attention_site(module: nn.Module) -> AttentionSite:
    """How prompts enter an attention module: that of zoo's own, or what the module offers."""
    if isinstance(module, Attention):
        return ZooAttentionSite(module)
    offering: Any = module
    site: AttentionSite = offering.attention_site()
    return site


def _modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under its name before anything was adapted; the parts of adapters are passed over."""
    for name, child in root.named_children():
        path = f"{prefix}{name}"
        base = child.base if isinstance(child, Adapted) else child
        if _kind(base) is not None:
            yield path, base
        if name != "attend" and not isinstance(child, Prompts):
            yield from _modules(base, f"{path}.")


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, Attention) or hasattr(module, "attention_site"):
        return "attention"
    if isinstance(module, nn.Linear) or is_quantized(module) or is_transposed(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    has_weight = isinstance(getattr(module, "weight", None), nn.Parameter)
    return "norm" if has_weight and "norm" in type(module).__name__.lower() else None


def _place(name: str) -> tuple[int | None, str]:
    match = _LAYER.search(name)
    return (None, name) if match is None else (int(match[1]), name[match.end() :])


def _head(root: nn.Module, modules: list[tuple[str, nn.Module]]) -> nn.Module | None:
    """The linear outside of the layers with an output for every row of an embedding."""
    vocabularies = {module.num_embeddings for _, module in modules if isinstance(module, nn.Embedding)}
    linears = [m for name, m in modules if _kind(m) == "linear" and _place(name)[0] is None]
    tied = [m for m in linears if shape_of(m)[0] in vocabularies]
    return tied[-1] if tied else None
