"""Whether the choices of a recipe go together, and what each ``auto`` becomes: before anything is built.

Headers are read, no weights. What is wrong is said all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from zoo.adapters.choose import choose_adapter
from zoo.adapters.discover import sites_of
from zoo.api import checkpoints_directory, choose_device
from zoo.attention.base import AttentionRequest, Choice, choose_attention
from zoo.convert.base import Checkpoint
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError, UnavailableError, ZooError
from zoo.families.base import Family
from zoo.plan.sites import AdapterPlan, Site, sites_of_spec
from zoo.precision.base import Precision, choose_precision
from zoo.precision.quantization import Quantizer, choose_quantizer, quantized_weights
from zoo.registry import Registry
from zoo.sources.resolve import resolve_model
from zoo.spec import ModelSpec
from zoo.store.locate import trained_directory
from zoo.train.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Resolution:
    """What became of one choice."""

    option: str
    asked: str
    chosen: str
    why: str = ""

    def __str__(self) -> str:
        same = self.asked == self.chosen
        told = self.chosen if same else f"{self.asked} -> {self.chosen}"
        return f"{self.option}: {told}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class _Base:
    """The model that is to be trained, as far as headers tell."""

    family: Family
    spec: ModelSpec
    stored: torch.dtype
    quantizer: str | None = None
    is_quantized: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Base:
        """What is trained further."""
        stored = checkpoint.tensors.dtype(next(iter(checkpoint.located())))
        return cls(checkpoint.family, checkpoint.spec, stored, checkpoint.quantizer, checkpoint.quantized)

    @property
    def is_own(self) -> bool:
        """Whether it is a module of the family's own."""
        return self.family.build is not None

    def sites(self) -> list[Site]:
        """Where adapters can attach."""
        if self.family.build is None:
            return sites_of_spec(self.spec)
        with torch.device("meta"):
            return sites_of(self.family.build(self.spec))


class _Checks:
    """Collects what is wrong, so that a user is told once."""

    def __init__(self) -> None:
        self.problems: list[ZooError] = []
        self.resolutions: list[Resolution] = []

    def tried(self, call: Callable[[], T]) -> T | None:
        """What a call gives; its refusal is kept."""
        try:
            return call()
        except (InputError, UnavailableError) as error:
            self.problems.append(error)
            return None

    def resolve(self, option: str, asked: str, chosen: str, why: str = "") -> None:
        """Keep what became of a choice."""
        self.resolutions.append(Resolution(option, asked, chosen, why))

    def finish(self) -> list[Resolution]:
        """The choices, if nothing is wrong with them.

        Raises:
            InputError, UnavailableError: all that is wrong.
        """
        if not self.problems:
            return self.resolutions
        if len(self.problems) == 1:
            raise self.problems[0]
        kind = InputError if any(isinstance(p, InputError) for p in self.problems) else UnavailableError
        raise kind("the choices of this recipe can not be:\n  " + "\n  ".join(map(str, self.problems)))


def compose(recipe: Recipe, registry: Registry, say: Callable[[str], None] = lambda line: None) -> list[Resolution]:
    """Check every choice of a recipe against the others.

    Raises:
        InputError, UnavailableError: a choice is unknown, can not be used here, or does not go with another; all of
            them in one message.
    """
    checks = _Checks()
    device = checks.tried(lambda: choose_device(recipe.device))
    base = checks.tried(lambda: _base_of(recipe, registry, say))
    if device is not None:
        checks.resolve("device", recipe.device, str(device), _why_device(recipe.device, device))
    if device is None or base is None:
        return checks.finish()
    quantizer = checks.tried(lambda: _quantizer_of(recipe, base, device, registry))
    if quantizer is not None:
        why = "" if recipe.quantize else "the weights are stored so"
        checks.resolve("quantize", recipe.quantize or "auto", quantizer.name, why)
    precision = checks.tried(lambda: _precision_of(recipe, base, device, registry, quantized=quantizer is not None))
    if precision is not None:
        asked = _name(recipe.precision)
        checks.resolve("precision", asked, precision.name, _why_precision(recipe, base) if asked == "auto" else "")
        attention = checks.tried(lambda: _attention_of(recipe, base, device, precision, registry))
        if attention is not None:
            refused = "; ".join(f"{name}: {' and '.join(why)}" for name, why in attention.rejected.items())
            checks.resolve("attention", recipe.attention, attention.name, refused)
        elif base.is_own:
            checks.resolve("attention", recipe.attention, "own", f"models of the family {base.family.name!r} have it")
    plan = checks.tried(lambda: _plan_of(recipe, base, quantizer, registry))
    if plan is not None:
        checks.resolve("adapter", recipe.adapter.use, recipe.adapter.use, _where(plan))
    strategy = "ddp" if recipe.strategy == "auto" and recipe.world_size > 1 else recipe.strategy
    why = f"{recipe.world_size} process" + ("es" if recipe.world_size > 1 else "")
    checks.resolve("strategy", recipe.strategy, "single" if strategy == "auto" else strategy, why)
    return checks.finish()


def _base_of(recipe: Recipe, registry: Registry, say: Callable[[str], None]) -> _Base:
    if recipe.task == "pretrain":
        entry = registry.model(recipe.model)
        family: Family = registry.load("family", entry.family)
        return _Base(family, ModelSpec.from_dict({**entry.spec_values, **recipe.spec}), torch.float32)
    found = resolve_model(recipe.model, registry, checkpoints=checkpoints_directory(), report=say)
    return _Base.of(open_checkpoint(trained_directory(found.path, "model", say), registry))


def _quantizer_of(recipe: Recipe, base: _Base, device: torch.device, registry: Registry) -> Quantizer | None:
    """Raises for a model that has no weights to round, or no linears of zoo's."""
    name = recipe.quantize or base.quantizer
    if name is None:
        return None
    if recipe.task == "pretrain":
        raise InputError(f"quantize {name!r} is for weights that are there: pretraining begins with random ones.")
    if base.is_own:
        raise InputError(
            f"quantize {name!r} and the family {base.family.name!r} do not go together: its models are modules of its "
            "own, and a quantizer replaces the linears of zoo's decoder.",
            fix="Leave --quantize out.",
        )
    return choose_quantizer(name, device=device.type, registry=registry)


def _name(asked: Any) -> str:
    """Of a component, named alone or with options."""
    return str(getattr(asked, "use", asked))


def _precision_of(
    recipe: Recipe, base: _Base, device: torch.device, registry: Registry, *, quantized: bool
) -> Precision:
    asked: Any = recipe.precision
    more: dict[str, Any] = {"options": asked.options} if getattr(asked, "options", None) else {}
    name = _name(asked)
    if name == "auto" and recipe.task == "pretrain":
        name = "32-true"
    return choose_precision(
        name,
        stored=base.stored,
        quantized=base.is_quantized or quantized,
        device=device.type,
        registry=registry,
        training=True,
        **more,
    )


def _attention_of(
    recipe: Recipe, base: _Base, device: torch.device, precision: Precision, registry: Registry
) -> Choice | None:
    """``None`` for a module with an attention of its own."""
    if base.is_own:
        if recipe.attention != "auto":
            raise InputError(
                f"attention {recipe.attention!r} and the family {base.family.name!r} do not go together: its models "
                "are modules with an attention of their own.",
                fix="Leave --attention out.",
            )
        return None
    request = AttentionRequest.of(base.spec, device=device.type, dtype=precision.param_dtype, training=True)
    if precision.autocast_dtype is not None:
        request = replace(request, dtype=precision.autocast_dtype)
    if recipe.packing:
        request = replace(request, mask_features=request.mask_features | {"documents"})
    return choose_attention(recipe.attention, request, registry)


def _plan_of(recipe: Recipe, base: _Base, quantizer: Quantizer | None, registry: Registry) -> AdapterPlan:
    """Raises where the adapter's targets are not there, or are integers and would have to be trained."""
    adapter = choose_adapter(recipe.adapter.use, recipe.adapter.options, registry)
    plan: AdapterPlan = adapter.options.plan(base.sites())
    if quantizer is not None:
        integers = quantized_weights(base.spec, quantizer)
        trained = [name for name in plan.unfrozen or () if name in integers]
        if trained:
            raise InputError(
                f"adapter {recipe.adapter.use!r} and quantize {quantizer.name!r} do not go together: it trains "
                f"{trained[0]}{f' and {len(trained) - 1} more' if len(trained) > 1 else ''}, and integers can not be "
                "trained.",
                fix="Take --adapter lora, or leave --quantize out.",
            )
    return plan


def _why_device(asked: str, device: torch.device) -> str:
    return "no GPU was found" if asked == "auto" and device.type == "cpu" else ""


def _why_precision(recipe: Recipe, base: _Base) -> str:
    if recipe.task == "pretrain":
        return "new weights are float32"
    return f"the weights are {'quantized' if base.is_quantized else str(base.stored).removeprefix('torch.')}"


def _where(plan: AdapterPlan) -> str:
    roles: Sequence[str] = list(dict.fromkeys(addition.site.role for addition in plan.additions))
    places = ", ".join(roles) or "parameters of the model"
    return f"{plan.n_trainable:,} parameters at {places}"
