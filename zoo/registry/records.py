"""What a registry holds: components (code, imported when used) and model entries (data)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo.errors import InputError
from zoo.spec import ModelSpec

KINDS: dict[str, str] = {
    "model": "models",
    "family": "families",
    "attention": "attention",
    "adapter": "adapters",
    "precision": "precisions",
    "quantizer": "quantizers",
    "converter": "converters",
    "source": "sources",
    "dataset": "datasets",
    "prompt": "prompts",
    "sampler": "samplers",
    "logger": "loggers",
    "command": "commands",
}
"""Every kind and its plural, as the hooks and the command line spell them."""

BUILT_IN = "zoo"
"""Origin of everything that zoo itself registers."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which distribution (or registry file) something came from."""

    distribution: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True, kw_only=True)
class DeviceNeeds:
    """Hardware without which a component can not run."""

    accelerator: Literal["cuda", "mps"]
    min_capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.accelerator not in ("cuda", "mps"):
            raise InputError(f"a component can need the accelerator 'cuda' or 'mps', not {self.accelerator!r}.")
        pair = self.min_capability
        if pair is not None and not (isinstance(pair, tuple) and [type(number) for number in pair] == [int, int]):
            raise InputError(f"min_capability is a pair such as (8, 0), not {pair!r}.")

    def __str__(self) -> str:
        if self.min_capability is None:
            return self.accelerator
        return f"{self.accelerator} with compute capability {'.'.join(map(str, self.min_capability))} or newer"


@dataclass(frozen=True, kw_only=True)
class Component:
    """One thing that can be chosen by name. ``target`` is imported when the component is used, not before."""

    kind: str
    name: str
    target: str
    """``package.module:Object``."""
    help: str
    options: str | None = None
    """``package.module:Dataclass`` of its options, in a module that imports no torch."""
    requires: tuple[str, ...] = ()
    """PEP 508 requirements beyond what zoo itself depends on."""
    needs: DeviceNeeds | None = None
    fix: str | None = None
    """The command that installs what is missing."""
    matches: tuple[str, ...] = ()
    """Outside names it answers to: ``model_type`` for families, URL scheme for sources, suffix for converters."""
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A named model: which family, which shape, where its weights are."""

    name: str
    family: str = ""
    spec_values: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    """Where the weights can be had, best first: ``hf:org/name``, ``pypi:dist==1.0/member#sha256=...``."""
    license: str = ""
    help: str = ""
    extends: str | None = None
    origin: Origin

    kind = "model"

    @property
    def spec(self) -> ModelSpec:
        """The entry's architecture.

        Raises:
            InputError: the entry's values do not make a valid spec.
        """
        whose = f"model {self.name!r} ({self.origin})"
        try:
            return ModelSpec.from_dict(self.spec_values)
        except InputError as error:
            raise InputError(f"{whose}: {error.message}", fix=error.fix) from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{whose}: its spec has a value of the wrong type: {error}.") from None
