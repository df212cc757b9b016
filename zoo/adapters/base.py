"""The contract of an adapter, and the module that carries adapters at a site. Read this first, then `attach`.

An adapter type is a dataclass of options that plans without torch, and a class that makes the parts of the plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from zoo.plan.sites import AdapterPlan, Addition, Place, Site


class AdapterOptions(Protocol):
    """A frozen dataclass; its fields are what a user can set."""

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """What the adapter adds to, and trains of, a model with these sites.

        Raises:
            InputError: the options do not fit the sites.
        """


class Part(nn.Module):
    """What one adapter adds at one linear, convolution or embedding. By default it changes nothing."""

    def before(self, x: Tensor) -> Tensor:
        """The input of the site."""
        return x

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The result of the site, from what `before` made of the input and from ``base(x)``."""
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A weight (outputs first) and a bias with which the site alone does what it does with this part; float32."""
        raise NotImplementedError


class AttentionPart(nn.Module, ABC):
    """What one adapter adds at one attention layer."""

    @abstractmethod
    def forward(self, q_BTNH: Tensor) -> Tensor:
        """To be added to the heads' results, or after their projection: `Adapter.place`. (B, T, N, H)."""


class AttentionSite(Protocol):
    """How prompts enter an attention layer: what a module has to offer for methods such as LLaMA-Adapter."""

    n_heads: int
    n_kv_heads: int
    width: int
    """Length D of a prompt's vectors."""
    scale: float
    """The factor on the scores."""
    device: torch.device
    places: tuple[Place, ...]
    """What `install` can do; a site that says nothing is taken to know ``before_projection`` alone."""

    def prompt_kv(self, prompt_PD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K, H) of P vectors, with the layer's own projections and without positions."""

    def install(self, prompts: nn.Module, place: Place = "before_projection") -> None:
        """Have the layer call ``prompts(q_BTNH, y_BTNH)``, with the queries as attended, for its result.

        ``before_projection``: y are the heads' results, and what is returned is projected in their place.
        ``after_projection``: y is the layer's result, seen as heads, and what is returned is the result instead. Only
        where the heads together are as wide as the model.
        """


class Adapter:
    """A parameter-efficient method.

    Args:
        options: an instance of ``options_type``.
        name: the one it is registered under.
    """

    options_type: ClassVar[type]
    keeps_original: ClassVar[bool] = True
    """Whether the former values of what it unfreezes are kept, for `AttachedAdapter.disabled`."""
    learning_rate: ClassVar[float] = 2e-4
    """A highest rate that suits it, for models of around a billion parameters."""

    def __init__(self, options: Any, name: str = "") -> None:
        self.options, self.name = options, name

    @property
    def place(self) -> Place:
        """Where its attention parts add their results."""
        return "before_projection"

    def part(self, addition: Addition, base: nn.Module) -> Part:
        """The new module of a planned site, with exactly the planned parameters, as it is before training."""
        raise NotImplementedError  # for adapters whose plans add nothing to such sites

    def attention_part(self, addition: Addition, site: AttentionSite) -> AttentionPart:
        """As `part`, for a site of the kind ``attention``."""
        raise NotImplementedError

    def unmergeable(self, plan: AdapterPlan) -> list[str]:
        """Why it can not be merged into the weights, one sentence each; empty: it can."""
        return []


class Adapted(nn.Module):
    """A module with the parts of any number of adapters around it; those that are active apply in turn."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.parts = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """As the base, adapted."""
        parts: list[Any] = [self.parts[name] for name in self.active]
        for part in parts:
            x = part.before(x)
        y: Tensor = self.base(x)
        for part in parts:
            y = part.after(x, y, self.base)
        return y

    def __getattr__(self, name: str) -> Any:
        """What this module lacks is the base's, so that ``linear.weight`` still is one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class Prompts(nn.Module):
    """The attention parts of any number of adapters; those that are active add up."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def forward(self, q_BTNH: Tensor, y_BTNH: Tensor) -> Tensor:
        """The results (B, T, N, H), of the heads or of the layer, with what the parts add."""
        for name in self.active:
            y_BTNH = y_BTNH + self.parts[name](q_BTNH)
        return y_BTNH
