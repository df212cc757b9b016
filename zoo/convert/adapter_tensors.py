"""The tensors of an adapter file: checked against what a model needs, and taken apart into zoo's parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from zoo.convert.torch_file import some
from zoo.errors import FileFormatError
from zoo.plan.sites import Site

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """What a file should hold under a name.

    Attributes:
        shape: of the stored tensor.
        ours: the parameters whose values it holds, one after the other, with their shapes.
    """

    shape: Shape
    ours: Mapping[str, Shape]

    @classmethod
    def stacked(cls, ours: Mapping[str, Shape]) -> StoredTensor:
        """The rows of the first parameter, then those of the next."""
        first = next(iter(ours.values()))
        return cls((sum(shape[0] for shape in ours.values()), *first[1:]), ours)


def take_apart(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, StoredTensor], where: object, *, fix: str
) -> dict[str, Tensor]:
    """Zoo's parameters by name.

    Raises:
        FileFormatError: a tensor is missing or unknown, or has another shape.
    """
    problems = []
    if missing := wanted.keys() - tensors.keys():
        problems.append(f"lacks {some(missing)}")
    if unknown := tensors.keys() - wanted.keys():
        problems.append(f"holds {some(unknown)}, for which this model has no place")
    problems += [
        f"holds {key} of the shape {tuple(tensors[key].shape)}, which is {stored.shape} for this model"
        for key, stored in wanted.items()
        if key in tensors and tensors[key].shape != stored.shape
    ][:3]
    if problems:
        raise FileFormatError(f"{where} {'; it '.join(problems)}.", fix=fix)
    found: dict[str, Tensor] = {}
    for key, stored in wanted.items():
        values = tensors[key].flatten().split([prod(shape) for shape in stored.ours.values()])
        found |= {name: part.view(shape) for (name, shape), part in zip(stored.ours.items(), values, strict=True)}
    return found


def norms_option(trained: Collection[Site], norms: Collection[Site]) -> bool | tuple[str, ...]:
    """Which of a model's norms are trained, for an adapter's ``norms``; those of a role together."""
    if len(trained) == len(norms):
        return bool(norms)
    return tuple(dict.fromkeys(site.role for site in trained)) or False
