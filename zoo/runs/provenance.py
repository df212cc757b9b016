"""Which distributions the components of a recipe come from: noted in a run, and asked for when it is repeated."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from zoo.errors import InputError, UnavailableError
from zoo.registry import BUILT_IN, Origin, Registry
from zoo.train.recipe import Recipe

KINDS = {"adapter": "adapter", "precision": "precision", "attention": "attention", "quantize": "quantizer"}
KINDS |= {"prompt_style": "prompt", "data": "dataset", "model": "model"}
"""Keys of a recipe that name components, and the kinds of these."""
ALL_KINDS = (*KINDS.values(), "logger")


def with_plugins(recipe: Recipe, registry: Registry) -> Recipe:
    """The recipe with the plugins that its components come from, and their versions."""
    origins = {origin.distribution: origin.version for origin in _origins(recipe, registry)}
    return recipe.model_copy(update={"plugins": {**recipe.plugins, **dict(sorted(origins.items()))}})


def check_plugins(recipe: Recipe, registry: Registry) -> None:
    """Ask for the plugins that a recipe was written with.

    Raises:
        UnavailableError: one is not installed, or is switched off or broken.
    """
    there = {item.origin.distribution for kind in ALL_KINDS for _, item in registry.items(kind)}
    for name, was in recipe.plugins.items():
        if name in there:
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise UnavailableError(
                f"this recipe was written with the plugin {name} {was}, which is not installed.",
                fix=f"python -m pip install {name}=={was}; or choose other components, and take it out of 'plugins'.",
            ) from None
        raise UnavailableError(
            f"this recipe was written with the plugin {name} {was}; {name} {installed} is installed, and not loaded.",
            fix=f"See: python -m zoo plugins show {name}.",
        )


def _origins(recipe: Recipe, registry: Registry) -> Iterator[Origin]:
    """Of the components that plugins registered."""
    named: list[tuple[str, Any]] = [(kind, getattr(recipe, key)) for key, kind in KINDS.items()]
    named += [("logger", use) for use in recipe.loggers]
    for kind, asked in named:
        name = getattr(asked, "use", asked)
        try:
            found = registry.model(name) if kind == "model" else registry.find(kind, name or "")
        except InputError:  # a path, a file, auto; or unknown, which is told elsewhere
            continue
        if found.origin.distribution != BUILT_IN:
            yield found.origin
