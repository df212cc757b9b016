"""Sites: the places of a model where an adapter can attach, and how an adapter's targets name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from zoo.errors import InputError, UnknownNameError
from zoo.plan.parameters import parameter_shapes
from zoo.spec import ModelSpec

Kind = Literal["linear", "conv", "embedding", "norm", "attention"]
Place = Literal["before_projection", "after_projection"]
"""Where prompts add their result in an attention layer: to the heads, or to what the projection makes of them."""
ALL_LINEAR = "all-linear"
"""The target that stands for every linear but the head."""


@dataclass(frozen=True)
class Site:
    """A place where an adapter can attach.

    Attributes:
        name: its path in the module tree.
        role: what it is for, the same in every layer: ``attn.q``, ``mlp.down``, ``head``. Modules whose family declares
            no roles have their own last name here.
        shape: of the weight, outputs first; of an attention layer the shape of a prompt's vector and of its gates,
            (D, N).
        layer: counted from 0; ``None`` outside of the layers.
        has_bias: whether there is a bias beside the weight.
        tied: whether another module uses the same weight.
        transposed: whether the module holds its weight inputs first.
    """

    name: str
    role: str
    kind: Kind
    shape: tuple[int, ...]
    layer: int | None = None
    has_bias: bool = False
    tied: bool = False
    transposed: bool = False

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The site's own parameters by name in the module tree."""
        if self.kind == "attention":
            return {}
        shapes = {f"{self.name}.weight": self.shape[::-1] if self.transposed else self.shape}
        return shapes | {f"{self.name}.bias": self.shape[:1]} if self.has_bias else shapes


def sites_of_spec(spec: ModelSpec) -> list[Site]:
    """The sites of the decoder that a spec describes, in the order of its modules, without torch."""
    shapes = parameter_shapes(spec)
    sites = []
    for parameter, shape in shapes.items():
        name, _, leaf = parameter.rpartition(".")
        if leaf == "weight":
            layer, role = _place(name)
            tied = spec.tie_embeddings and name == "embed"
            sites.append(Site(name, role, _kind(role), shape, layer, f"{name}.bias" in shapes, tied))
    if spec.tie_embeddings:
        sites.append(Site("head", "head", "linear", (spec.vocab_size, spec.d_model), None, spec.head_bias, True))
    attention = ((spec.d_model, spec.n_heads),) * spec.n_layers
    return sites + [Site(f"blocks.{i}.attn", "attn", "attention", shape, i) for i, shape in enumerate(attention)]


def _place(name: str) -> tuple[int | None, str]:
    if not name.startswith("blocks."):
        return None, name
    _, layer, role = name.split(".", 2)
    return int(layer), role


def _kind(role: str) -> Kind:
    if role in ("embed", "positions"):
        return "embedding"
    return "norm" if "norm" in role else "linear"


def choose_sites(sites: Sequence[Site], targets: Iterable[str], kinds: Sequence[Kind]) -> list[Site]:
    """The sites that any target names.

    A target is a role, a module's full name or the end of it (``q_proj``), a glob over full names, `ALL_LINEAR`, or
    ``=`` and a full name, for that module and no other.

    Raises:
        UnknownNameError: a target names no site of these kinds.
        InputError: `ALL_LINEAR` names none.
    """
    possible = [site for site in sites if site.kind in kinds]
    chosen: dict[str, Site] = {}
    for target in targets:
        named = [site for site in possible if _matcher(target)(site)]
        if not named:
            raise _names_nothing(target, list(dict.fromkeys(site.role for site in possible)), kinds)
        chosen |= {site.name: site for site in named}
    return [site for site in possible if site.name in chosen]


def _names_nothing(target: str, roles: Sequence[str], kinds: Sequence[Kind]) -> InputError:
    listed = f"Sites: {', '.join(roles)}." if roles else f"The model has no site of the kinds {', '.join(kinds)}."
    if target == ALL_LINEAR and "linear" in kinds:
        only, fix = (" but the head", 'Target it by its role: "head".') if "head" in roles else ("", listed)
        return InputError(f"{ALL_LINEAR} is every linear but the head, and this model has no linear{only}.", fix=fix)
    return UnknownNameError("site", target, [*roles, ALL_LINEAR] if "linear" in kinds else roles, fix=listed)


def _matcher(target: str) -> Callable[[Site], bool]:
    if target == ALL_LINEAR:
        return lambda site: site.kind == "linear" and site.role != "head"
    if target.startswith("="):
        return lambda site: site.name == target[1:]
    return lambda site: (
        target in (site.role, site.name) or site.name.endswith("." + target) or fnmatchcase(site.name, target)
    )


def last_layers(sites: Iterable[Site], n_layers: int) -> Iterator[Site]:
    """The sites of the topmost ``n_layers`` layers."""
    inside = [site for site in sites if site.layer is not None]
    top = max((site.layer for site in inside if site.layer is not None), default=-1)
    return (site for site in inside if site.layer is not None and site.layer > top - n_layers)


@dataclass(frozen=True)
class Addition:
    """New parameters at a site, by name; the adapter's own names, such as ``lora_A``.

    Attributes:
        shared: parameters that are another site's too, by name: that site, whose addition has their shapes.
    """

    site: Site
    shapes: dict[str, tuple[int, ...]]
    shared: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter does to a model, before any of it is done.

    Attributes:
        additions: new parameters.
        unfrozen: parameters of the model that train along, by name, with their shapes.
    """

    additions: tuple[Addition, ...] = ()
    unfrozen: dict[str, tuple[int, ...]] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trainable parameter, under the name it has in the adapter's state."""
        added = {f"{a.site.name}.{name}": shape for a in self.additions for name, shape in a.shapes.items()}
        return added | (self.unfrozen or {})

    @property
    def n_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(prod(shape) for shape in self.shapes.values())
