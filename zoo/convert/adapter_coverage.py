"""Whether a file lacks a module: by what its config targets, or where it has none by the layers that it adapts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from zoo.convert.adapter_files import CONFIG
from zoo.convert.adapter_names import OwnNames
from zoo.convert.torch_file import some
from zoo.errors import FileFormatError
from zoo.plan.sites import Site

_FIRST_NUMBER = r".*?\.[^.]*\.(\d+)\."


def require_targets(config: Mapping[str, Any], given: Collection[str], names: OwnNames, where: Path) -> None:
    """Refuse a file of PEFT's that lacks a module which its config targets.

    Nothing else tells it from one that was made for fewer modules.

    Args:
        given: the modules that the file holds something for, by their names outside.

    Raises:
        FileFormatError: a module is missing, or the config has a regular expression that is none.
    """
    try:
        missing = [module for module in targeted(config, names.modules()) if module not in given]
    except re.error as error:
        raise FileFormatError(f"{where / CONFIG} has a regular expression that is none: {error}.") from None
    if missing or not given:
        modules = some(missing) or "any module"
        raise FileFormatError(
            f"{where} holds no {config['peft_type']} weights of {modules}, and its target_modules are "
            f"{config.get('target_modules')!r}.",
            fix=_fix(where),
        )


def _fix(path: Path) -> str:
    return f"Save or copy it again. If it was trained so: partial=True, on the command line {path},partial=true."


def targeted(config: Mapping[str, Any], modules: Collection[str]) -> list[str]:
    """Those of a model's modules that PEFT would adapt; but what is a module's full name means that one alone."""
    return [module for module in modules if _is_target(config, module, modules)]


def _is_target(config: Mapping[str, Any], module: str, modules: Collection[str]) -> bool:
    saved = config.get("modules_to_save") or ()
    if _is_named(config.get("exclude_modules"), module) or any(
        re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved
    ):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str) or module in (targets or ()):
        return _is_named(targets, module)
    ends = [target for target in targets or () if target not in modules]
    return _is_named(ends, module) and _is_in_layers(config, module)


def _is_named(targets: str | Sequence[str] | None, module: str) -> bool:
    """Whether they name a module: a regular expression, or names and ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [_FIRST_NUMBER]
    match = next(filter(None, (re.match(expression, module) for expression in expressions)), None)
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])


def require_whole_layers(adapted: Collection[str], sites: Sequence[Site], names: OwnNames, path: Path) -> None:
    """Refuse a file without a config that has LoRA for a role in some layers, and lacks it in others of the file.

    Which layers are adapted is free where all roles are adapted in the same ones, and those are evenly spaced: all,
    the upper half, every second. Anything else can not be told from a file that has lost something.

    Args:
        adapted: names of the sites that the file holds LoRA for.

    Raises:
        FileFormatError: a module is missing.
    """
    stacks: dict[str, dict[str, dict[int, Site]]] = {}
    for site in (site for site in sites if site.layer is not None and site.kind != "attention"):
        stack = site.name.removesuffix(f"{site.layer}.{site.role}")
        stacks.setdefault(stack, {}).setdefault(site.role, {})[site.layer or 0] = site
    missing = [site for roles in stacks.values() for site in _holes(roles.values(), adapted)]
    if missing:
        modules = some(dict.fromkeys(names.module(site.name) for site in missing))
        raise FileFormatError(
            f"{path} holds no LoRA of {modules}, and of the same in other layers it does.", fix=_fix(path)
        )


def _holes(roles: Collection[Mapping[int, Site]], adapted: Collection[str]) -> list[Site]:
    """The sites that should be adapted, of the roles of one stack of layers, each by layer."""
    used = [
        {layer: site for layer, site in role.items() if any(s.name in adapted for s in role.values())} for role in roles
    ]
    layers = sorted({layer for role in used for layer, site in role.items() if site.name in adapted})
    return [role[layer] for role in used for layer in _filled(layers, sorted(role)) if role[layer].name not in adapted]


def _filled(layers: Sequence[int], possible: Sequence[int]) -> list[int]:
    """Those of the possible layers that are adapted, and if they are unevenly spaced also those in between."""
    places = [i for i, layer in enumerate(possible) if layer in layers]
    steps = {after - before for before, after in pairwise(places)}
    if len(steps) > 1:
        places = list(range(places[0], places[-1] + 1))
    return [possible[i] for i in places]
