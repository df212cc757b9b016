"""The key map of a family that builds a module of its own: its files have the parameters' own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import nn

from zoo.families.base import KeyMap, Rule
from zoo.families.transforms import TRANSFORMS
from zoo.plan.parameters import Shapes
from zoo.spec import ModelSpec

Build = Callable[[ModelSpec], nn.Module]


class SameNames(KeyMap):
    """Stored tensors are called as the module's parameters are.

    Args:
        build: the family's.
        ignore: regular expressions of stored names that carry no weights (buffers).
    """

    def __init__(self, build: Build, *, ignore: Sequence[str] = ()) -> None:
        super().__init__("", ignore=ignore, shapes=lambda spec: _shapes(build, spec)[0])
        self._build = build

    def ignores(self, name: str, spec: ModelSpec) -> bool:
        """Whether a stored name is declared to carry nothing, or is another name of a parameter that is shared."""
        return name in _shapes(self._build, spec)[1] or super().ignores(name, spec)

    def _rules(self, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
        for name, shape in shapes.items():
            yield Rule(name, (name,), (shape,), TRANSFORMS["same"], spec)


@lru_cache(maxsize=8)
def _shapes(build: Build, spec: ModelSpec) -> tuple[Shapes, frozenset[str]]:
    """The parameters of what is built, and the further names of those that are shared."""
    with torch.device("meta"):
        module = build(spec)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return shapes, frozenset(names - shapes.keys())
